"""Checkpoints of ``transformers``: telling them from bundles, their identity, loading them.

Only local folders, only safetensors, no code from the folder.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import torch

from common import files
from common.bundle_format import CONFIG, KV_STATS
from common.errors import BackendError, BundleError

EXPORTED_TYPE = "lipllm"
"""``model_type`` of folders that ``lipllm export`` writes."""
PRUNE_MANIFEST = "prune_manifest.json"
"""What ``lipllm compress`` leaves beside the weights of a checkpoint."""
RESIZED = "lipllm"
"""The manifest's ``loader`` where layers have shapes that the library cannot describe."""

_HASHES_AT_ONCE = 4


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a folder holds a checkpoint of ``transformers`` rather than a bundle."""
    return isinstance(_read(Path(path).expanduser() / CONFIG).get("model_type"), str)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, nothing where there is none."""
    try:
        content = files.from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
        folder: Has ``config.json`` and safetensors files; layers that ``lipllm compress`` left with
            shapes of their own get these.
        dtype: Type of the weights; None for the stored one.

    Raises:
        BundleError: for a missing or damaged file, a class that is none of the library's, or the
            folder of an exported bundle.
        BackendError: when ``transformers`` is not installed.
    """
    if _read(folder / CONFIG).get("model_type") == EXPORTED_TYPE:
        raise BundleError(
            f"{folder}: written by lipllm export for transformers; give the bundle that it was "
            "made from"
        )
    library = transformers_library()
    is_resized = _read(folder / PRUNE_MANIFEST).get("loader") == RESIZED
    try:
        model, info = library.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=is_resized,
            output_loading_info=True,
        )
        found = _resize(model, folder, {key[0] for key in info["mismatched_keys"]})
    except Exception as error:  # every version of the library has its own
        raise BundleError(
            f"{folder}: transformers {library.__version__} cannot load it ({first_line(error)}); "
            "restore the folder or choose a decoder model in safetensors format"
        ) from error
    # The library fills what is missing with random numbers.
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - found)
    if missing:
        raise BundleError(f"{folder}: tensor {missing[0]} is missing; restore the weights")
    return model


def _resize(model: Any, folder: Path, names: set[str]) -> set[str]:
    """Give parameters the shapes and values that are stored; return the names of those found."""
    found = set()
    for file in sorted(folder.glob("*.safetensors")) if names else ():
        with safetensors.safe_open(file, framework="pt") as tensors:
            for name in names.intersection(tensors.keys()):
                place, _, leaf = name.rpartition(".")
                value = tensors.get_tensor(name).to(model.get_parameter(name).dtype)
                setattr(model.get_submodule(place), leaf, torch.nn.Parameter(value))
                found.add(name)
    return found


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (getattr(error, "strerror", None) or (lines or [type(error).__name__])[0])[:200]
