"""Statistics on disk: safetensors with a digest of everything, no pickle, never half a file."""

# Legend: I inputs of a pruned map.

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.certificate import tensors_sha256
from common.errors import DataError
from common.files import replace_bytes
from compress.statistics.grams import Moments, Statistics

FORMAT = "lipllm statistics 1"
PARTS = ("fitted", "apart")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a pass is.

    Attributes:
        fingerprint: Of everything that decides the sums; None where nobody will go on.
        done: Batches that are in the sums.
        batches: Batches of the whole pass.
    """

    fingerprint: str | None = None
    done: int = 0
    batches: int = 0


def save_statistics(path: Path, statistics: Statistics, progress: Progress = Progress()) -> None:
    """Write statistics to ``path`` atomically; an old file stays until the new one is whole.

    Args:
        path: The file; its folder is made.
        statistics: On any device.
        progress: How far the pass is that collects them; finished by default.

    Raises:
        OSError: when the disk is full or the folder is not writable; an old file is untouched.
    """
    tensors, counts = {}, {}
    for part in PARTS:
        for name, moments in getattr(statistics, part).items():
            tensors[f"{part}/{name}/second"] = moments.second_II.cpu()
            tensors[f"{part}/{name}/first"] = moments.first_I.cpu()
            counts[f"{part}/{name}"] = [moments.count, moments.skipped]
    facts = json.dumps({"counts": counts, "progress": dataclasses.asdict(progress)})
    metadata = {"format": FORMAT, "facts": facts, "sha256": _digest(tensors, facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, safetensors.torch.save(tensors, metadata))


def load_statistics(path: Path, device: torch.device | str = "cpu") -> Statistics:
    """Return what ``save_statistics`` or a finished ``collect`` wrote.

    Args:
        path: The file.
        device: Where the sums will be.

    Raises:
        DataError: for a file that is missing, damaged, foreign, or of an unfinished pass.
    """
    statistics, progress = read_statistics(path, device)
    if progress.done < progress.batches:
        raise DataError(
            f"{path}: holds {progress.done} of {progress.batches} batches; expected a finished "
            "pass: run the command that began it again"
        )
    return statistics


def read_statistics(path: Path, device: torch.device | str) -> tuple[Statistics, Progress]:
    """Return the statistics in a file and how far their pass is; errors as ``load_statistics``."""
    tensors, facts = _read(path)
    parts: dict[str, dict[str, Moments]] = {part: {} for part in PARTS}
    for key, (count, skipped) in facts["counts"].items():
        part, _, name = key.partition("/")
        moments = Moments(len(tensors[f"{key}/first"]), device)
        moments.second_II.copy_(tensors.pop(f"{key}/second"))
        moments.first_I.copy_(tensors[f"{key}/first"])
        moments.count, moments.skipped = count, skipped
        parts[part][name] = moments
    return Statistics(**parts), Progress(**facts["progress"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            names = stored.keys() if metadata.get("format") == FORMAT else ()
            tensors = {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: not a complete statistics file ({error}); remove it to start over"
        ) from error
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; name another file"
        )
    if metadata.get("sha256") != _digest(tensors, metadata.get("facts", "")):
        raise DataError(
            f"{path}: the sums do not match their digest, the file is damaged; remove it to "
            "start over"
        )
    return tensors, json.loads(metadata["facts"])


def _digest(tensors: dict[str, Tensor], facts: str) -> str:
    return hashlib.sha256(json.dumps([facts, tensors_sha256(tensors)]).encode()).hexdigest()
