"""Checkpoints of ``transformers``: load one to prune it, save the smaller model.

Where all layers have one shape the result is an ordinary checkpoint. Otherwise only ``load_hf``
reads it: the manifest holds the sizes of every layer. Nothing is pickled, nothing is fetched.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

from common import files
from common.bundle_format import CONFIG
from common.checkpoints import (
    RESIZED,
    checkpoint_fingerprint,
    first_line,
    is_checkpoint,
    load_causal_model,
    transformers_library,
)
from common.device import resolve_device
from common.errors import BundleError, ConfigError
from compress.adapters.hugging_face import decoder_adapter
from compress.checkpoints.manifest import (
    COMPRESSION,
    MANIFEST,
    kept_inputs,
    make_manifest,
    read_manifest,
    require_own,
    tokenizer_files,
)

log = logging.getLogger(__name__)


def load_hf(path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """Load a decoder model from a folder, ordinary or saved by ``save_hf``.

    Args:
        path: Folder with ``config.json`` and safetensors files.
        dtype: Type of the weights; the stored one by default.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        The model in evaluation mode.

    Raises:
        BundleError: for a name of the hub, a missing or damaged file, a foreign format.
        ConfigError: for an architecture that cannot be pruned, or a bad device.
        BackendError: when ``transformers`` is not installed.
    """
    folder, device = Path(path).expanduser(), resolve_device(device)
    if not (folder / CONFIG).is_file():
        raise BundleError(
            f"{path}: expected a folder with {CONFIG}; models of the hub, gated ones too, are not "
            "fetched: download it (hf download NAME --local-dir FOLDER) and name the folder"
        )
    if not is_checkpoint(folder):
        raise BundleError(f"{folder / CONFIG}: names no model_type; expected one of transformers")
    library = transformers_library()
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    try:
        if manifest is not None and manifest["loader"] == RESIZED:
            model = _load_resized(library, folder, manifest, dtype)
        else:
            model = load_causal_model(folder, dtype)
    except (BundleError, ConfigError):
        raise
    except Exception as error:  # every version of the library has its own
        raise BundleError(
            f"{folder}: transformers {library.__version__} cannot load it ({first_line(error)}); "
            "restore the folder or choose a decoder model in safetensors format"
        ) from error
    decoder_adapter(model)
    return model.to(device).eval()


def save_hf(
    model: Any,
    path: str | Path,
    *,
    parent: str | Path | None = None,
    compression: Mapping[str, Any] | None = None,
) -> bool:
    """Write a model as a checkpoint, replacing one of ours at ``path`` as a whole.

    Args:
        model: Decoder model of ``transformers``, pruned or not.
        path: Folder to write.
        parent: Checkpoint that it was made from; its tokenizer is copied along.
        compression: Plain JSON values for ``compression.json``.

    Returns:
        Whether plain ``from_pretrained`` loads it; else only ``load_hf`` does, as the log says.

    Raises:
        BundleError: for a place that is not writable or holds something else; what was there
            stays as it was.
    """
    path = Path(path).expanduser().resolve()
    adapter = decoder_adapter(model)
    origin = None if parent is None else Path(parent).expanduser().resolve()
    fingerprint = None if origin is None else checkpoint_fingerprint(origin)
    is_plain = is_ordinary(model)
    require_own(path)
    try:
        with files.staged_directory(path) as stage:
            model.save_pretrained(stage)
            for file in [] if origin is None else tokenizer_files(origin):
                files.write_bytes(stage / file.name, file.read_bytes())
            if compression is not None:
                source = {} if fingerprint is None else {"parent_fingerprint": fingerprint}
                files.write_json(stage / COMPRESSION, {**source, **compression})
            loader = "transformers" if is_plain else RESIZED
            manifest = make_manifest(adapter, stage, loader=loader, parent=fingerprint)
            files.write_json(stage / MANIFEST, manifest)
            files.swap_directory(stage, path)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"{path}: cannot write the checkpoint ({first_line(error)}); what was there is "
            "unchanged; free space or choose another folder"
        ) from error
    if not is_plain:
        log.warning(
            "%s: its layers have shapes that %s cannot describe, plain transformers cannot load "
            "it: use load_hf of compress.checkpoints.checkpoint, or prune with "
            "compress.allocation=uniform (GPT-2: keep_heads=1) for an ordinary checkpoint",
            path,
            type(model.config).__name__,
        )
    return is_plain


def is_ordinary(model: Any) -> bool:
    """Return whether a model has the shapes that its own configuration describes."""
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(model.config.to_dict()))
    return _shapes(plain) == _shapes(model)


class _Unallocated(TorchFunctionMode):
    """Leave weights without memory; buffers, which no file holds, are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _load_resized(
    library: Any, folder: Path, manifest: Mapping[str, Any], dtype: torch.dtype | None
) -> Any:
    """Build the dense model without memory, resize its layers, put in the stored tensors."""
    config = library.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    with _Unallocated(), torch.random.fork_rng(devices=[]):
        dense = library.AutoModelForCausalLM.from_config(config)
    adapter = decoder_adapter(dense)
    model = adapter.cut(kept_inputs(adapter, folder, manifest))
    state: dict[str, torch.Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            state |= safetensors.torch.load_file(folder / name)
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        model.config.dtype = dtype
    unfilled = list(model.parameters())
    unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    model.tie_weights()
    old = {id(parameter) for parameter in unfilled}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) in old]
    if wrong := [*missing, *unexpected]:
        state_of = "missing" if missing else "not expected"
        raise BundleError(f"{folder}: tensor {wrong[0]} is {state_of}; restore the weights")
    if (folder / "generation_config.json").is_file():
        model.generation_config = library.GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
    return model


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
