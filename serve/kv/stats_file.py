"""Calibration statistics of a checkpoint as a file: tensors, and whose they are."""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from common import files
from common.bundle_format import parse_tensors
from common.errors import BundleError

FORMAT_VERSION = "1"
REMEDY = "run lipllm calibrate bundle=DIR again"


def write_stats(
    path: Path, stats: Mapping[str, Tensor], fingerprint: str, origin: str = ""
) -> None:
    """Write statistics as one step.

    Args:
        path: File to write or replace.
        stats: As ``serve.kv.calibrate.calibrate`` returns them.
        fingerprint: Identity of the model's configuration and weights.
        origin: The command or the file that they are from.

    Raises:
        OSError: when the place cannot be written.
    """
    metadata = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "origin": origin}
    tensors = {name: value.contiguous() for name, value in stats.items()}
    files.replace_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def read_stats(path: Path, fingerprint: str) -> dict[str, Tensor]:
    """Return the statistics of a file.

    Args:
        path: Written by ``write_stats``.
        fingerprint: Identity of the model that is to use them.

    Raises:
        BundleError: for a missing or damaged file, another format, or another model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as content:
            metadata = content.metadata() or {}
        data = path.read_bytes()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: cannot be read ({reason}); {REMEDY}") from None
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format version {version!r}, expected {FORMAT_VERSION!r}; {REMEDY}"
        )
    if metadata.get("fingerprint") != fingerprint:
        raise BundleError(
            f"{path}: statistics of another model (its configuration or weights differ); {REMEDY}"
        )
    return parse_tensors(path.parent, path.name, data)
