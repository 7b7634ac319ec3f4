"""Files of a model directory: names, hashes, and the checks that name a damaged one.

Only ``common.bundle`` and ``common.locate`` use this module; every error says which file is wrong
and what to do.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common import files
from common.certificate import tensors_sha256
from common.classifier_certificate import AnyCertificate
from common.errors import BundleError, LipError
from common.ledger import versions
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
COMPRESSION = "compression.json"
KV_STATS = "kv_stats.safetensors"
PROVENANCE = "provenance.json"
CERTIFICATE = ("certificate.json", "certificate.safetensors")
# The model itself: proofs and statistics can be added without changing its fingerprint.
_IDENTITY = (CONFIG, WEIGHTS, TOKENIZER)
_KNOWN = (*_IDENTITY, *CERTIFICATE, COMPRESSION, KV_STATS, PROVENANCE)


def read_files(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the content of every file it lists, all hashes checked.

    Raises:
        BundleError: for a missing, changed, unlisted or foreign file, naming it.
        OSError: when a file cannot be read.
    """
    manifest = parse_json(path, MANIFEST, {MANIFEST: (path / MANIFEST).read_bytes()})
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path / MANIFEST}: format version {version!r}, expected {FORMAT_VERSION}; use the "
            "lipllm version that wrote it, or make the bundle again"
        )
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not {CONFIG, WEIGHTS} <= set(hashes):
        raise BundleError(f"{path / MANIFEST}: lists no weights; make the bundle again")
    contents = {}
    for name, expected in hashes.items():
        if not (path / name).is_file() or name not in _KNOWN:
            raise BundleError(f"{path / name}: listed in {MANIFEST} but missing; restore the file")
        contents[name] = (path / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(
                f"{path / name}: content differs from its hash in {MANIFEST}"
                f"{_which_tensor(path, name, contents[name])}; the file is damaged or was edited, "
                "restore it or make the bundle again"
            )
    for name in _KNOWN:
        if name not in hashes and (path / name).exists():
            raise BundleError(f"{path / name}: not listed in {MANIFEST}; remove the file")
    if manifest.get("fingerprint") != fingerprint(hashes):
        raise BundleError(f"{path / MANIFEST}: fingerprint does not match; restore the file")
    return manifest, contents


def _which_tensor(path: Path, name: str, data: bytes) -> str:
    """Name the changed tensor where the certificate knows the hashes of all of them."""
    source = {WEIGHTS: "weights_sha256", CERTIFICATE[1]: "multipliers_sha256"}.get(name)
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError, AttributeError):
        if source is not None:
            known = json.loads((path / CERTIFICATE[0]).read_text())[source]
            found = tensors_sha256(safetensors.torch.load(data))
            changed = [key for key, value in known.items() if found.get(key) != value]
            return f" (tensor {changed[0]})" if changed else ""
    return ""


def replace_files(
    path: Path,
    contents: Mapping[str, bytes],
    certificate: AnyCertificate | None,
    manifest: Mapping[str, Any],
    command: str,
) -> None:
    """Write a whole bundle beside ``path``, its manifest last, and swap it in.

    Args:
        path: Final place.
        contents: File name to content, all but the certificate and the manifest.
        certificate: Written by its own ``save``, or None to leave it out or take ``contents``.
        manifest: ``kind``, ``parent`` and earlier ``commands``.
        command: Command line to append to ``commands``; empty for none.

    Raises:
        OSError: when writing fails; what was at ``path`` is unchanged.
    """
    with files.staged_directory(path) as stage:
        for name, data in contents.items():
            files.write_bytes(stage / name, data)
        if certificate is not None:
            certificate.save(stage)
        hashes = {file.name: files.sha256_file(file) for file in sorted(stage.iterdir())}
        files.write_json(
            stage / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "kind": manifest["kind"],
                "fingerprint": fingerprint(hashes),
                "parent": manifest["parent"],
                "files": hashes,
                "versions": versions(),
                "commands": [*manifest["commands"], *([command] if command else [])],
            },
        )
        files.swap_directory(stage, path)


def describe_model(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the kind of a model and its constructor settings as JSON types."""
    if isinstance(model, LipschitzTransformer):
        return "transformer", model.config.to_dict()
    if isinstance(model, LipschitzMLP):
        return "classifier", model.config.to_dict()
    raise BundleError(
        f"model of type {type(model).__name__}: expected LipschitzTransformer or LipschitzMLP"
    )


def build_model(path: Path, data: bytes) -> LipschitzTransformer | LipschitzMLP:
    """Return an untrained model from the content of ``config.json``; ``BundleError`` if foreign."""
    content = parse_json(path, CONFIG, {CONFIG: data})
    version, kind = content.get("format_version"), content.get("kind")
    if version != FORMAT_VERSION or not isinstance(content.get(str(kind)), dict):
        raise BundleError(
            f"{path / CONFIG}: format version {version!r}, kind {kind!r}: expected version "
            f"{FORMAT_VERSION} of a transformer or classifier; make the bundle again"
        )
    try:
        # Initial values are overwritten: drawing them must not move the caller's generator.
        with torch.random.fork_rng(devices=[]):
            if kind == "transformer":
                return LipschitzTransformer(ModelConfig.from_dict(content[kind]))
            return LipschitzMLP(**content["classifier"])
    except (LipError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        # The last two are torch's for sizes beyond any memory.
        reason = str(error).splitlines()[0]
        raise BundleError(f"{path / CONFIG}: {reason}; restore the file") from None


def fill_model(path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put tensors into a model; half precision becomes float32; ``BundleError`` for wrong shapes.

    Half precision is for storage: its numbers are exact in float32, sums in it are not.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else None
        if expected.get(name) != found:
            raise BundleError(
                f"{path / WEIGHTS}: tensor {name} is {found or 'missing'}, {CONFIG} expects "
                f"{expected.get(name) or 'none'}; restore both files of one model"
            )
        if not state[name].is_floating_point():
            raise BundleError(
                f"{path / WEIGHTS}: tensor {name} is of type {state[name].dtype}, expected a "
                "floating type; restore the file"
            )
    half = (torch.bfloat16, torch.float16)
    exact = {name: t.float() if t.dtype in half else t for name, t in state.items()}
    model.load_state_dict(exact, assign=True)


def fingerprint(hashes: Mapping[str, str]) -> str:
    """Return the sha256 (hex) over the hashes of configuration, weights and tokenizer."""
    lines = [f"{name} {hashes[name]}\n" for name in _IDENTITY if name in hashes]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def json_bytes(value: Any) -> bytes:
    """Return ``value`` as the bytes of a JSON file."""
    return files.to_json(value).encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file."""
    # Copies where tensors share memory or are views: the format stores each on its own.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return bytes(safetensors.torch.save(whole))


def parse_json(path: Path, name: str, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the JSON object in ``contents[name]``; ``BundleError`` naming the file otherwise."""
    try:
        value = files.from_json(contents[name])
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / name}: not JSON ({error}); restore the file") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path / name}: expected a JSON object; restore the file")
    return value


def parse_tensors(path: Path, name: str, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; ``BundleError`` for a truncated or damaged one."""
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, ValueError) as error:
        raise BundleError(
            f"{path / name}: not a complete safetensors file ({error}); restore it"
        ) from None
