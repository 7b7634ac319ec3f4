"""A folder of ``transformers`` ready to serve: model, tokenizer, statistics."""

import dataclasses
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from common.bundle_format import KV_STATS
from common.checkpoints import (
    checkpoint_fingerprint,
    first_line,
    is_checkpoint,
    load_causal_model,
)
from common.errors import BackendError, BundleError
from serve.hugging_face.decoder import HuggingFaceDecoder
from serve.hugging_face.tokenizer import HuggingFaceTokenizer
from serve.kv.stats_file import read_stats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint, with the names of a ``Bundle`` where both have something.

    Attributes:
        path: The folder.
        model: The model as a decoder.
        tokenizer: Its tokenizer.
        stop_token_ids: Tokens that end a text, by the model's own settings.
        stats_path: Statistics of ``calibrate``; by default those in the folder.
    """

    path: Path
    model: HuggingFaceDecoder
    tokenizer: HuggingFaceTokenizer
    stop_token_ids: tuple[int, ...] = ()
    stats_path: Path | None = None
    kind = "transformer"
    certificate = None

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over configuration and weights as stored; all of them are read, once."""
        return checkpoint_fingerprint(self.path)

    @property
    def kv_stats(self) -> dict[str, Tensor] | None:
        """Statistics of this model, None where it was not calibrated.

        Raises:
            BundleError: for a damaged file, or one of another model.
        """
        place = self.stats_path or self.path / KV_STATS
        if self.stats_path is None and not place.is_file():
            return None
        return read_stats(place, self.fingerprint)


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    stats: Path | None = None,
) -> Checkpoint:
    """Load a causal language model from a local folder.

    Args:
        path: Folder with ``config.json``, safetensors files and a tokenizer; names of the hub are
            not fetched, pickled weights and code in the folder not read.
        device: Where the model goes.
        dtype: Weights and cache, such as "bfloat16"; None keeps the stored type.
        stats: Statistics file, where it is not ``kv_stats.safetensors`` in the folder.

    Raises:
        BundleError: for a missing or damaged file.
        ConfigError: for a model that the cache cannot hold.
        BackendError: without ``transformers``, or when the device is not available.
    """
    folder = Path(path).expanduser().resolve()
    if not is_checkpoint(folder):
        raise BundleError(
            f"{path}: expected a folder with the config.json of transformers; models of the hub "
            "are not fetched: download it (hf download NAME --local-dir FOLDER) and name the folder"
        )
    model = load_causal_model(folder, None if dtype is None else getattr(torch, dtype))
    tokenizer = HuggingFaceTokenizer.load(folder)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"device={device}: not available ({first_line(error)}); use device=cpu"
        ) from None
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = model.config.eos_token_id if ends is None else ends
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Checkpoint(
        path=folder,
        model=HuggingFaceDecoder(model),
        tokenizer=tokenizer,
        stop_token_ids=tuple(stops),
        stats_path=stats,
    )
