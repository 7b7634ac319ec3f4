"""What lies beside the weights of a pruned checkpoint: sizes of its layers, hashes, origin."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import files
from common.checkpoints import PRUNE_MANIFEST as MANIFEST
from common.checkpoints import RESIZED
from common.errors import BundleError
from common.ledger import versions
from compress.adapters.decoder import DecoderAdapter
from compress.targets import Target

COMPRESSION = "compression.json"
FORMAT_VERSION = 1
LOADERS = ("transformers", RESIZED)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)


def make_manifest(
    adapter: DecoderAdapter, folder: Path, *, loader: str, parent: str | None
) -> dict[str, Any]:
    """Describe the finished files of a checkpoint.

    Args:
        adapter: Around the saved model.
        folder: Where its files are.
        loader: Who can load it, one of ``LOADERS``.
        parent: Fingerprint of the checkpoint it was made from.

    Returns:
        JSON values: ``layers`` with the sizes of each, ``files`` with the sha256 of every file,
        so of the configuration that the layers deviate from and of the weights.
    """
    layers = [adapter.shape(index)._asdict() for index in range(len(adapter.layers))]
    return {
        "format_version": FORMAT_VERSION,
        "loader": loader,
        "architecture": type(adapter.model).__name__,
        "layers": layers,
        "parent": parent,
        "files": {file.name: files.sha256_file(file) for file in sorted(folder.iterdir())},
        "versions": {**versions(), "transformers": metadata.version("transformers")},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking the hash of every file it lists.

    Raises:
        BundleError: for a foreign format, a missing or changed file, naming it.
    """
    place = folder / MANIFEST
    manifest = read_json(place)
    version, listed = manifest.get("format_version"), manifest.get("files")
    if version != FORMAT_VERSION or manifest.get("loader") not in LOADERS:
        raise BundleError(
            f"{place}: format version {version!r}, loader {manifest.get('loader')!r}: expected "
            f"version {FORMAT_VERSION}; use the lipllm version that wrote it"
        )
    if not isinstance(listed, dict) or not isinstance(manifest.get("layers"), list):
        raise BundleError(f"{place}: lists no files or layers; restore the file")
    for name, expected in listed.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise BundleError(f"{folder / name}: listed in {MANIFEST} but missing; restore it")
        if files.sha256_file(folder / name) != expected:
            raise BundleError(
                f"{folder / name}: content differs from its hash in {MANIFEST}; restore it, or "
                f"remove {MANIFEST} if the checkpoint was changed on purpose and is an ordinary one"
            )
    return manifest


def kept_inputs(
    adapter: DecoderAdapter, folder: Path, manifest: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return inputs to keep per target so that every layer gets the manifest's sizes.

    Args:
        adapter: Around the dense model of the stored configuration.
        folder: Named in messages.
        manifest: As read.

    Raises:
        BundleError: for sizes that the dense model cannot be cut to.
    """
    layers = manifest["layers"]
    if len(layers) != len(adapter.layers):
        raise BundleError(
            f"{folder / MANIFEST}: {len(layers)} layers, the configuration has "
            f"{len(adapter.layers)}; restore both files of one model"
        )
    kept = {}
    for target in adapter.targets():
        shape = adapter.shape(target.layer)
        count = _count(layers[target.layer], target, shape.heads // shape.kv_heads)
        if count is None:
            raise BundleError(
                f"{folder / MANIFEST}: layer {target.layer}: {layers[target.layer]} does not fit "
                f"into the dense {shape._asdict()}; restore both files of one model"
            )
        kept[target.name] = torch.arange(count * target.unit)
    return kept


def _count(sizes: Any, target: Target, group: int) -> int | None:
    """Return how many components of a target a layer of the manifest keeps; None for nonsense."""
    if not isinstance(sizes, dict):
        return None
    count = sizes.get("kv_heads" if target.kind == "heads" else "mlp_width")
    if type(count) is not int or not 1 <= count <= target.components:
        return None
    is_whole = target.kind != "heads" or sizes.get("heads") == count * group
    return count if is_whole else None


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def require_own(path: Path) -> None:
    """Refuse a place that holds the user's own files.

    Raises:
        BundleError: unless it is free, empty, or holds a checkpoint with a manifest of ours.
    """
    files.recover_directory(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not (path / MANIFEST).is_file():
        raise BundleError(
            f"{path}: holds something else than a pruned checkpoint; choose another folder"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        BundleError: when there is none.
    """
    try:
        value = files.from_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: cannot be read ({reason}); restore the file") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path}: expected a JSON object; restore the file")
    return value
