"""The trusted core: re-proves every bound of a certificate from weights and multipliers.

Float64, no solver code. Each bound is valid for any positive multipliers, so a certificate can be
wrong only through this file, ``claims``, ``admissible``, ``classifier_checker``, the ``*_proof``
modules, ``slopes``, or ``norms``, ``*certificate``, ``bundle`` and ``models`` of ``common``.
Source: spec bound_tightening 4.6, 7, 8.
"""

# Shape letters: C width, V vocabulary.

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.bundle import Bundle, load_bundle, resolve_bundle
from common.certificate import (
    KINDS,
    BlockProof,
    Certificate,
    log10_up,
    product_up,
)
from common.classifier_certificate import ClassifierCertificate, load_certificate
from common.errors import CertificateError, LipError
from common.files import from_json
from common.models import ClassifierConfig, LipschitzMLP, LipschitzTransformer, ModelConfig
from common.proof_file import FORMAT_VERSION
from solvers.bounds.claims import VerifyReport, at_least, check_identity
from solvers.bounds.classifier_checker import check_classifier
from solvers.bounds.ellipsoid import Ellipsoid
from solvers.bounds.head_proof import domain_radius, head_norms
from solvers.bounds.mlp_proof import BlockBound
from solvers.bounds.stream_proof import Stream, advance, logit_factors, stream_factors

STORED_MARGIN = 1e-10
"""Relative amount a certifier adds to what is proved here, so that another machine agrees."""

_BLOCK_FIELDS = ("naive", "tightened", "radius_out", "naive_radius_out")


def check(
    config: ModelConfig | ClassifierConfig, tensors: Mapping[str, Tensor], certificate: Any
) -> VerifyReport:
    """Re-prove a certificate from a configuration and the tensors of a model's state.

    Args:
        config: Of a transformer or a classifier.
        tensors: The model's state, any floating types.
        certificate: ``Certificate`` or ``ClassifierCertificate``, as the model needs.

    Raises:
        CertificateError: naming the first tensor, field or block that is wrong.
    """
    if isinstance(config, ClassifierConfig) and isinstance(certificate, ClassifierCertificate):
        return check_classifier(config, tensors, certificate)
    if isinstance(config, ModelConfig) and isinstance(certificate, Certificate):
        return _check_transformer(config, tensors, certificate)
    raise CertificateError(
        f"{type(certificate).__name__}: not a proof about a {type(config).__name__}; certify again"
    )


def _check_transformer(
    config: ModelConfig, tensors: Mapping[str, Tensor], certificate: Certificate
) -> VerifyReport:
    began = time.perf_counter()
    check_identity(config, tensors, certificate)
    _check_header(config, certificate)
    at_least("radius", certificate.radius, domain_radius(tensors["embedding.weight"]))
    margin, stream = STORED_MARGIN, Stream.start(config.width, certificate.radius)
    radius = naive_radius = certificate.radius
    for index, block in enumerate(certificate.blocks):
        _check_place(index, block, radius, naive_radius)
        proved, after = advance(
            config, tensors, index, stream, certificate.block_multipliers(index)
        )
        _check_block(block, proved)
        radius, naive_radius = block.radius_out, block.naive_radius_out
        stream = after.at(radius, naive_radius)
        margin += proved.margin + STORED_MARGIN
    _check_totals(config, tensors, certificate, stream.changes)
    return VerifyReport(
        tightened=certificate.tightened,
        naive=certificate.naive,
        blocks=len(certificate.blocks),
        multipliers=len(certificate.multipliers),
        margin=margin,
        seconds=time.perf_counter() - began,
    )


def verify(target: str | Path | Bundle | nn.Module, certificate: Any = None) -> VerifyReport:
    """Re-prove the certificate of a bundle, or of a model and a certificate given with it.

    Args:
        target: Bundle, its directory or name; or a ``LipschitzTransformer`` or ``LipschitzMLP``.
        certificate: Needed with a model only.

    Raises:
        CertificateError: naming the tensor, field or block that is wrong.
        BundleError: naming a file that is missing, damaged or not as its manifest says.
    """
    if isinstance(target, nn.Module):
        if certificate is None:
            raise CertificateError("verify(model): expected a certificate beside the model")
        return check(_config(target), target.state_dict(), certificate)
    path = target.path if isinstance(target, Bundle) else resolve_bundle(target)
    # Tensor hashes come before the manifest: they say which tensor was changed.
    try:
        report = check(*_read_model(path), load_certificate(path))
    except LipError:
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        # A tensor that does not fit the configuration: the loader says which.
        load_bundle(path)
        raise CertificateError(f"{path}: {error}; certify again") from error
    load_bundle(path)
    return report


def _config(model: nn.Module) -> ModelConfig | ClassifierConfig:
    if not isinstance(model, LipschitzTransformer | LipschitzMLP):
        raise CertificateError(f"model of type {type(model).__name__}: no proof is known for it")
    return model.config


def _read_model(path: Path) -> tuple[ModelConfig | ClassifierConfig, dict[str, Tensor]]:
    try:
        content = from_json((path / "config.json").read_text())
        tensors = safetensors.torch.load((path / "model.safetensors").read_bytes())
        if content["kind"] == "classifier":
            return ClassifierConfig(**content["classifier"]), tensors
        return ModelConfig.from_dict(content["transformer"]), tensors
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, LipError) as error:
        load_bundle(path)
        raise CertificateError(f"{path}: no model can be read from it ({error})") from error


def _check_header(config: ModelConfig, certificate: Certificate) -> None:
    expected = {
        "format_version": FORMAT_VERSION,
        "width": config.width,
        "vocab_size": config.vocab_size,
    }
    for name, value in expected.items():
        if getattr(certificate, name) != value:
            raise CertificateError(f"{name}={getattr(certificate, name)!r}: expected {value}")
    if len(certificate.blocks) != 2 * config.layers:
        raise CertificateError(
            f"{len(certificate.blocks)} blocks: expected {2 * config.layers} (two per layer)"
        )
    if certificate.reference_sound and most_heads(config) > 1:
        raise CertificateError("reference_sound: expected false for more than one head")
    if strangers := [
        name
        for name in certificate.multipliers
        if not any(name.startswith(block.key) for block in certificate.blocks)
    ]:
        raise CertificateError(f"multiplier tensor {strangers[0]}: belongs to no block")


def _check_place(index: int, block: BlockProof, radius: float, naive_radius: float) -> None:
    place = (block.index, block.layer, block.kind)
    expected = (index, index // 2, KINDS[index % 2])
    if place != expected:
        raise CertificateError(f"block {index}: found (index, layer, kind) {place}, not {expected}")
    for name, value in (("radius_in", radius), ("naive_radius_in", naive_radius)):
        if getattr(block, name) != value:
            raise CertificateError(
                f"block {index} {name}={getattr(block, name)!r}: expected {value!r}, the radius "
                "after the block before it"
            )


def _check_block(block: BlockProof, proved: BlockBound) -> None:
    for name in _BLOCK_FIELDS:
        at_least(f"block {block.index} {name}", getattr(block, name), getattr(proved, name))
    # Only so is the naive bound, proved on its own ball, a bound on the ball of radius_in too.
    place = f"block {block.index} naive_radius_out (against radius_out)"
    at_least(place, block.naive_radius_out, block.radius_out)
    attack = block.components.get("attack", 0.0)
    at_least(f"block {block.index} tightened (against attack)", block.tightened, attack)
    at_least(f"block {block.index} naive (against tightened)", block.naive, block.tightened)


def _check_totals(
    config: ModelConfig, tensors: Mapping[str, Tensor], certificate: Certificate, changes: Ellipsoid
) -> None:
    head_VC = tensors["head.weight"]
    head, pair = head_norms(config, head_VC)
    at_least("head_norm", certificate.head_norm, head)
    at_least("pair_norm", certificate.pair_norm, pair)
    stream = product_up(stream_chain(certificate, changes))
    at_least("stream", certificate.stream, stream, infinite=True)
    totals = {
        "naive": chain(certificate, "naive"),
        "tightened": logit_chain(certificate, config, head_VC, changes),
    }
    for which, factors in totals.items():
        at_least(which, getattr(certificate, which), product_up(factors), infinite=True)
        log10 = log10_up(factors)
        stored = getattr(certificate, f"log10_{which}")
        at_least(f"log10_{which}", stored, log10 - 1e-13 * (1 + abs(log10)))
    at_least("naive (against tightened)", certificate.naive, certificate.tightened, infinite=True)
    if certificate.reference_sound:
        at_least("reference", certificate.reference, certificate.tightened, infinite=True)
    if certificate.attack is not None:
        at_least("tightened (against attack)", certificate.tightened, certificate.attack)


def most_heads(config: ModelConfig) -> int:
    """Return the largest number of query heads in a layer."""
    return max(config.layer(index).heads for index in range(config.layers))


def chain(certificate: Certificate, which: str) -> list[float]:
    """Return the factors of a product bound: blocks, head, and ``sqrt(C / V)``."""
    blocks = [Certificate.constant(block, which) for block in certificate.blocks]
    return [*blocks, certificate.head_norm, _ratio(certificate)]


def stream_chain(certificate: Certificate, changes: Ellipsoid) -> list[float]:
    """Return the factors of the smaller bound on the final stream: blocks, or their ellipsoids."""
    blocks = [block.tightened for block in certificate.blocks]
    if not certificate.multipliers:
        return blocks
    return min(blocks, stream_factors(changes), key=log10_up)


def logit_chain(
    certificate: Certificate, config: ModelConfig, head_VC: Tensor, changes: Ellipsoid
) -> list[float]:
    """Return the factors of the smaller bound on the logits, RMS to RMS."""
    if not certificate.multipliers:
        return chain(certificate, "tightened")
    seen = [*logit_factors(config, head_VC, changes), _ratio(certificate)]
    return min(chain(certificate, "tightened"), seen, key=log10_up)


def _ratio(certificate: Certificate) -> float:
    return math.sqrt(certificate.width / certificate.vocab_size)
