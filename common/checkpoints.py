"""Checkpoints of ``transformers``: telling them from bundles, their identity, loading them.

Only local folders, only safetensors, no code from the folder.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common import files
from common.bundle_format import CONFIG, KV_STATS
from common.errors import BackendError, BundleError

_HASHES_AT_ONCE = 4


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a folder holds a checkpoint of ``transformers`` rather than a bundle."""
    try:
        config = files.from_json((Path(path).expanduser() / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def checkpoint_fingerprint(folder: Path) -> str:
    """Return the sha256 (hex) over configuration and weights of a checkpoint.

    Statistics of the cache that lie beside them do not count.

    Raises:
        BundleError: when they cannot be read.
    """
    weights = sorted(file for file in folder.glob("*.safetensors") if file.name != KV_STATS)
    identity = [folder / CONFIG, *weights]
    try:
        with ThreadPoolExecutor(_HASHES_AT_ONCE) as pool:
            hashes = list(pool.map(files.sha256_file, identity))
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot read the checkpoint ({error.strerror}); name its folder"
        ) from None
    lines = [f"{file.name} {sha256}\n" for file, sha256 in zip(identity, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def transformers_library() -> Any:
    """Return the module ``transformers``, which keeps its messages and bars to itself.

    Raises:
        BackendError: when it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise BackendError(
            "checkpoints of transformers need the package: pip install 'lipllm[hf]'"
        ) from None
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def load_causal_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return the causal language model of a folder, on the CPU.

    Args:
        folder: Has ``config.json`` and safetensors files.
        dtype: Type of the weights; None for the stored one.

    Raises:
        BundleError: for a missing or damaged file, or a class that is none of the library's.
        BackendError: when ``transformers`` is not installed.
    """
    library = transformers_library()
    try:
        model, info = library.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # every version of the library has its own
        raise BundleError(
            f"{folder}: transformers {library.__version__} cannot load it ({first_line(error)}); "
            "restore the folder or choose a decoder model in safetensors format"
        ) from error
    # The library fills what is missing with random numbers.
    missing = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if missing:
        raise BundleError(f"{folder}: tensor {missing[0]} is missing; restore the weights")
    return model


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (getattr(error, "strerror", None) or (lines or [type(error).__name__])[0])[:200]
