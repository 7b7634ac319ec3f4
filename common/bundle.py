"""The model directory: weights, configuration, tokenizer, proof, all hashed in a manifest.

Nothing in it is executable or pickled. A bundle is built beside its final place and swapped in,
so that a reader finds the old one or the new one, never a mixture.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common import files
from common.bundle_format import (
    CERTIFICATE,
    COMPRESSION,
    CONFIG,
    FORMAT_VERSION,
    KV_STATS,
    MANIFEST,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    build_model,
    describe_model,
    fill_model,
    json_bytes,
    parse_json,
    parse_tensors,
    read_files,
    replace_files,
    tensor_bytes,
)
from common.certificate import config_sha256, tensors_sha256
from common.classifier_certificate import AnyCertificate, load_certificate
from common.errors import BackendError, BundleError, CertificateError, LipError
from common.locate import is_shipped, resolve_bundle
from common.models import LipschitzTransformer
from common.tokenizer import Tokenizer, tokenizer_from_json

__all__ = ["Bundle", "extend_bundle", "load_bundle", "resolve_bundle", "save_bundle"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded model directory.

    Attributes:
        path: The directory.
        config: Constructor settings: ``ModelConfig``, or a mapping for a classifier.
        model: The model in evaluation mode; weights stored in half precision are float32 here.
        tokenizer: Its tokenizer; None for a classifier.
        compression: What was removed and what it cost, or None.
        kv_stats: Query/key statistics of ``calibrate``, or None.
        provenance: Command, seed and corpus of the training run (its parent's for a pruned
            model), or None.
        manifest: Hashes, parent fingerprint, versions, commands.
        void: Why the stored certificate does not speak about these weights, or None.
    """

    path: Path
    config: Any
    model: Any
    tokenizer: Tokenizer | None
    compression: dict[str, Any] | None
    kv_stats: dict[str, Tensor] | None
    provenance: dict[str, Any] | None
    manifest: dict[str, Any]
    void: str | None
    _certificate: AnyCertificate | None = dataclasses.field(repr=False)

    @property
    def kind(self) -> str:
        """``transformer`` or ``classifier``."""
        return str(self.manifest["kind"])

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) over configuration, weights and tokenizer: the identity of the model."""
        return str(self.manifest["fingerprint"])

    @property
    def certificate(self) -> Any:
        """``Certificate`` (of a classifier ``ClassifierCertificate``), or None without one.

        Raises:
            CertificateError: when it is void (made for other weights, or unreadable).
        """
        if self.void is not None:
            raise CertificateError(self.void)
        return self._certificate


def save_bundle(
    path: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    *,
    certificate: AnyCertificate | None = None,
    compression: Mapping[str, Any] | None = None,
    kv_stats: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    parent: Bundle | None = None,
    command: str = "",
    dtype: torch.dtype | None = None,
) -> Bundle:
    """Write a model directory, replacing an older bundle at ``path`` as a whole.

    Args:
        path: Directory to write.
        model: ``LipschitzTransformer`` or ``LipschitzMLP``; not modified.
        tokenizer: Needed for a transformer.
        certificate: Must be of exactly these weights.
        compression: Plain JSON values; ``parent_fingerprint`` is added when ``parent`` is given.
        kv_stats: Tensors by name.
        provenance: Plain JSON values, see ``common.provenance``; the parent's when left out.
        parent: The bundle this one was made from.
        command: The command line that made it.
        dtype: Store the weights rounded to this type (``torch.bfloat16`` halves the size); a
            certificate must then be of the rounded weights. None keeps the model's own.

    Returns:
        The bundle as read back from the disk.

    Raises:
        BundleError: for a place that is not writable (what was there stays as it was), or that
            holds something else than a bundle.
        CertificateError: when ``certificate`` is of other weights.
    """
    path = Path(path).expanduser().resolve()
    state = {k: t.detach().to(device="cpu", dtype=dtype) for k, t in model.state_dict().items()}
    kind, config = describe_model(model)
    if kind == "transformer" and tokenizer is None:
        raise BundleError(f"{path}: a transformer needs its tokenizer; pass one")
    if certificate is not None and (reason := _void_reason(path, certificate, state, model)):
        raise CertificateError(reason)
    parts = {
        CONFIG: json_bytes({"format_version": FORMAT_VERSION, "kind": kind, kind: config}),
        WEIGHTS: tensor_bytes(state),
    }
    if tokenizer is not None:
        parts[TOKENIZER] = json_bytes(tokenizer.to_json())
    if compression is not None and parent is not None:
        compression = {"parent_fingerprint": parent.fingerprint, **compression}
    if provenance is None and parent is not None:
        provenance = parent.provenance
    parts |= _optional_parts(compression, kv_stats, provenance)
    origin = parent.fingerprint if parent else None
    manifest: dict[str, Any] = {"kind": kind, "parent": origin, "commands": []}
    _replace(path, parts, certificate, manifest, command)
    return load_bundle(path)


def extend_bundle(
    path: str | Path,
    *,
    certificate: AnyCertificate | None = None,
    compression: Mapping[str, Any] | None = None,
    kv_stats: Mapping[str, Tensor] | None = None,
    command: str = "",
    copy_to: Path | None = None,
) -> Bundle:
    """Add or replace parts of a bundle as one step; the model itself stays as it is.

    Args:
        path: Directory or name of an existing bundle.
        certificate: New proof of exactly these weights.
        compression: New content of ``compression.json``.
        kv_stats: New query/key statistics.
        command: The command line that made the parts.
        copy_to: Where a copy of a shipped model goes, which is extended in its place.

    Returns:
        The bundle as read back from the disk; its ``path`` says where it is.

    Raises:
        BundleError: for a damaged bundle or a place that is not writable, and for a shipped model
            without ``copy_to``; the old bundle stays.
        CertificateError: when ``certificate`` is of other weights.
    """
    path = resolve_bundle(path)
    if is_shipped(path):
        path = _copied(path, copy_to)
    with _writing(path), files.directory_lock(path):
        manifest, contents = read_files(path)
        if certificate is not None:
            state = parse_tensors(path, WEIGHTS, contents[WEIGHTS])
            model = build_model(path, contents[CONFIG])
            if reason := _void_reason(path, certificate, state, model):
                raise CertificateError(reason)
            contents = {k: v for k, v in contents.items() if k not in CERTIFICATE}
        contents |= _optional_parts(compression, kv_stats)
        replace_files(path, contents, certificate, manifest, command)
    return load_bundle(path)


def load_bundle(path: str | Path, *, device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle, checking every hash.

    Args:
        path: Directory (of the bundle, or of the run that made it) or name of a shipped model.
        device: Where the model goes.

    Raises:
        BundleError: for a missing, damaged, truncated or foreign directory, naming the file.
        BackendError: when the device is not available.
    """
    path = resolve_bundle(path)
    try:
        with files.directory_lock(path, shared=True):
            manifest, contents = read_files(path)
            certificate, void = _read_certificate(path, contents)
    except OSError as error:
        raise BundleError(
            f"{error.filename or path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    model = build_model(path, contents[CONFIG])
    state = parse_tensors(path, WEIGHTS, contents[WEIGHTS])
    fill_model(path, model, state)
    if certificate is not None:
        void = _void_reason(path, certificate, state, model)
    is_transformer = isinstance(model, LipschitzTransformer)
    return Bundle(
        path=path,
        config=model.config if is_transformer else describe_model(model)[1],
        model=_moved(model, device).eval(),
        tokenizer=_read_tokenizer(path, contents),
        compression=parse_json(path, COMPRESSION, contents) if COMPRESSION in contents else None,
        kv_stats=parse_tensors(path, KV_STATS, contents[KV_STATS])
        if KV_STATS in contents
        else None,
        provenance=parse_json(path, PROVENANCE, contents) if PROVENANCE in contents else None,
        manifest=manifest,
        void=void,
        _certificate=certificate,
    )


def _moved(model: Any, device: str | torch.device) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"device={device}: not available ({reason}); use device=cpu") from None


def _read_tokenizer(path: Path, contents: Mapping[str, bytes]) -> Tokenizer | None:
    if TOKENIZER not in contents:
        return None
    content = parse_json(path, TOKENIZER, contents)
    try:
        return tokenizer_from_json(content)
    except LipError as error:
        raise BundleError(f"{path / TOKENIZER}: {error}") from None


def _replace(
    path: Path,
    parts: Mapping[str, bytes],
    certificate: AnyCertificate | None,
    manifest: Mapping[str, Any],
    command: str,
) -> None:
    _require_own(path)
    with _writing(path), contextlib.ExitStack() as stack:
        if path.exists():
            stack.enter_context(files.directory_lock(path))
        replace_files(path, parts, certificate, manifest, command)


def _copied(path: Path, target: Path | None) -> Path:
    """Copy a shipped model out of the installation and return where it is now."""
    if target is None:
        raise BundleError(
            f"bundle={path.name}: a shipped model is part of the installation and stays as it is; "
            f"copy the folder {path} and give the copy"
        )
    target = target.expanduser().resolve()
    _require_own(target)
    with _writing(target), files.staged_directory(target) as stage:
        for file in sorted(path.iterdir()):
            files.write_bytes(stage / file.name, file.read_bytes())
        files.swap_directory(stage, target)
    log.info("%s: a shipped model stays as it is; the result is a copy in %s", path.name, target)
    return target


def _require_own(path: Path) -> None:
    """Refuse a place that holds the user's own files."""
    files.recover_directory(path)
    is_free = not path.exists() or (path / MANIFEST).is_file()
    if not is_free and not (path.is_dir() and not any(path.iterdir())):
        raise BundleError(f"{path}: holds something else than a bundle; choose another folder")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(
            f"{path}: cannot write the bundle ({reason}); what was there is unchanged; free "
            "space or choose another folder"
        ) from error


def _read_certificate(
    path: Path, contents: Mapping[str, bytes]
) -> tuple[AnyCertificate | None, str | None]:
    if not any(name in contents for name in CERTIFICATE):
        return None, None
    try:
        return load_certificate(path), None
    except CertificateError as error:
        return None, str(error)


def _void_reason(
    path: Path, certificate: AnyCertificate, state: Mapping[str, Tensor], model: nn.Module
) -> str | None:
    remedy = f"the certificate is void; run: lipllm certify bundle={path}"
    found, stated = tensors_sha256(state), certificate.weights_sha256
    for name in sorted(found.keys() | stated.keys()):
        if found.get(name) != stated.get(name):
            return f"{path}: certificate of other weights ({name} differs); {remedy}"
    config = getattr(model, "config", None)
    if config is not None and config_sha256(config) != certificate.config_sha256:
        return f"{path}: certificate of another model configuration; {remedy}"
    return None


def _optional_parts(
    compression: Mapping[str, Any] | None,
    kv_stats: Mapping[str, Tensor] | None,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    parts = {}
    if provenance is not None:
        parts[PROVENANCE] = json_bytes(dict(provenance))
    if compression is not None:
        parts[COMPRESSION] = json_bytes(dict(compression))
    if kv_stats is not None:
        parts[KV_STATS] = tensor_bytes(kv_stats)
    return parts
