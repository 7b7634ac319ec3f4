"""Trusted: re-proves the certificate of an image classifier; float64, no solver code.

Norms come from Cholesky tests (``common.norms``), chains from ``chain_proof``; all multipliers are
taken as untrusted numbers. The domain is the whole input space.
"""

# Shape letters: I input features, O output features.

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.certificate import log10_up, product_up
from common.classifier_certificate import MODEL, ChainProof, ClassifierCertificate
from common.errors import CertificateError
from common.models import ClassifierConfig
from common.norms import EIGEN_MARGIN, exact64, gamma, round_up, spectral_norm_bound
from common.proof_file import FORMAT_VERSION
from solvers.bounds.chain_proof import (
    CHAIN_RANGE,
    LONGEST_CHAIN,
    chain_form,
    chain_proves,
    multiplier_lengths,
)
from solvers.bounds.claims import VerifyReport, at_least, check_identity

LARGEST_EXACT_CLASSES = 512
"""Above this many classes the distances of all pairs of rows are not formed."""


def matrices(config: ClassifierConfig, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the weight matrices as float64, first to last.

    Raises:
        CertificateError: for a matrix that is missing, of another shape, NaN or infinite.
    """
    found = []
    for index, (fan_in, fan_out) in enumerate(zip(config.sizes, config.sizes[1:], strict=False)):
        weight = tensors.get(f"linears.{index}.weight")
        if weight is None or tuple(weight.shape) != (fan_out, fan_in):
            shape = None if weight is None else tuple(weight.shape)
            raise CertificateError(
                f"weight tensor linears.{index}.weight: {shape}, expected {(fan_out, fan_in)}"
            )
        found.append(exact64(weight))
    return found


def pair_norm(last_OI: Tensor, norm: float) -> float:
    """Bound ``max_ij |U_i - U_j|_2`` over rows of the last matrix, whose norm bound is given."""
    bound = math.sqrt(2) * norm
    if len(last_OI) <= LARGEST_EXACT_CLASSES:
        squares = [
            float((rows_OI - row_I).square().sum(1).max())
            for row_I, rows_OI in ((row, last_OI) for row in last_OI)
        ]
        exact = math.sqrt(max(squares) * (1 + 2 * gamma(last_OI.shape[1] + 8)))
        bound = min(bound, exact)
    return round_up(bound)


def pair_bound(certificate: ClassifierCertificate) -> float:
    """Return what the certificate's parts prove about differences of two logits, l2."""
    through = product_up([*certificate.norms[:-1], certificate.pair_norm])
    return min(through, product_up([math.sqrt(2), certificate.tightened_l2]))


def check_classifier(
    config: ClassifierConfig, tensors: Mapping[str, Tensor], certificate: ClassifierCertificate
) -> VerifyReport:
    """Re-prove a certificate from a configuration and the tensors of a model's state.

    Raises:
        CertificateError: naming the first tensor, field or chain that is wrong.
    """
    began = time.perf_counter()
    check_identity(config, tensors, certificate)
    weights = matrices(config, tensors)
    _check_header(config, certificate, len(weights))
    norms = [spectral_norm_bound(weight) for weight in weights]
    for index, norm in enumerate(norms):
        at_least(f"norms[{index}]", certificate.norms[index], norm)
    at_least("pair_norm", certificate.pair_norm, pair_norm(weights[-1], norms[-1]))
    margin = EIGEN_MARGIN
    for block in certificate.blocks:
        margin = max(margin, _check_chain(config, weights, certificate, block))
    _check_totals(certificate)
    return VerifyReport(
        tightened=certificate.tightened,
        naive=certificate.naive,
        blocks=len(certificate.blocks),
        multipliers=len(certificate.multipliers),
        margin=margin,
        seconds=time.perf_counter() - began,
    )


def _check_header(config: ClassifierConfig, certificate: ClassifierCertificate, count: int) -> None:
    expected = {
        "format_version": FORMAT_VERSION,
        "model": MODEL,
        "inputs": config.sizes[0],
        "classes": config.sizes[-1],
    }
    for name, value in expected.items():
        if getattr(certificate, name) != value:
            raise CertificateError(f"{name}={getattr(certificate, name)!r}: expected {value}")
    if len(certificate.norms) != count:
        raise CertificateError(f"{len(certificate.norms)} norms: expected {count}")
    covered, place = 0, 0
    for block in certificate.blocks:
        # JSON may hold anything: 1.0 and true equal 1 but are no positions.
        are_places = {type(block.index), type(block.first), type(block.stop)} == {int}
        is_next = are_places and (block.index, block.first, block.kind) == (place, covered, "chain")
        if not is_next or not covered < block.stop <= count:
            raise CertificateError(
                f"chain {block.index}: matrices {block.first!r} to {block.stop!r}, expected the "
                f"next ones after {covered} of {count}"
            )
        covered, place = block.stop, place + 1
    if covered != count:
        raise CertificateError(f"chains cover {covered} matrices: expected {count}")
    known = {f"{block.key}{index}" for block in certificate.blocks for index in inside(block)}
    if strangers := sorted(set(certificate.multipliers) - known):
        raise CertificateError(f"multiplier tensor {strangers[0]}: belongs to no activation")


def inside(block: ChainProof) -> range:
    """Return the matrices of a chain that an activation of the chain follows."""
    return range(block.first, block.stop - 1)


def _check_chain(
    config: ClassifierConfig,
    weights: Sequence[Tensor],
    certificate: ClassifierCertificate,
    block: ChainProof,
) -> float:
    """Check one chain and return the rounding allowance of its proof."""
    name = f"block {block.index}"
    naive = product_up(certificate.norms[block.first : block.stop])
    at_least(f"{name} naive", block.naive, naive)
    at_least(f"{name} naive (against tightened)", block.naive, block.tightened)
    attack = block.components.get("attack", 0.0)
    at_least(f"{name} tightened (against attack)", block.tightened, attack)
    if block.tightened >= naive:
        return 0.0
    if block.stop - block.first > LONGEST_CHAIN:
        raise CertificateError(f"{name}: expected at most {LONGEST_CHAIN} matrices in a chain")
    part = weights[block.first : block.stop]
    lengths = multiplier_lengths(part, config.activation)
    found = [
        _multiplier(certificate, f"{block.key}{index}", length)
        for index, length in zip(inside(block), lengths, strict=True)
    ]
    # A chain of one matrix has no multipliers.
    joined = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
    margin = chain_proves(chain_form(part, config.activation), joined, block.tightened)
    if margin is None:
        raise CertificateError(
            f"{name} tightened={block.tightened!r}: not proved by the stored multipliers, which "
            f"would have to be better; certify again"
        )
    return margin


def _multiplier(certificate: ClassifierCertificate, name: str, length: int) -> Tensor:
    tensor = certificate.multipliers.get(name)
    if tensor is None:
        raise CertificateError(f"multiplier {name}: missing; certify again")
    if tensor.dtype != torch.float64 or tuple(tensor.shape) != (length,):
        raise CertificateError(
            f"multiplier {name}: {tensor.dtype} {tuple(tensor.shape)}, expected float64 "
            f"({length},); certify again"
        )
    low, high = CHAIN_RANGE
    if not bool(((tensor >= low) & (tensor <= high)).all()):
        raise CertificateError(
            f"multiplier {name}: expected positive finite numbers ({low:g} to {high:g}); certify "
            "again"
        )
    return tensor


def _check_totals(certificate: ClassifierCertificate) -> None:
    scale = certificate.scale
    chains = {
        "naive": [*certificate.norms],
        "tightened": [block.tightened for block in certificate.blocks],
    }
    for which, factors in chains.items():
        l2 = getattr(certificate, f"{which}_l2")
        at_least(f"{which}_l2", l2, product_up(factors), infinite=True)
        at_least(which, getattr(certificate, which), product_up([*factors, scale]), infinite=True)
        log10 = log10_up([*factors, scale])
        stored = getattr(certificate, f"log10_{which}")
        at_least(f"log10_{which}", stored, log10 - 1e-13 * (1 + abs(log10)))
    for suffix in ("", "_l2"):
        naive = getattr(certificate, f"naive{suffix}")
        tightened = getattr(certificate, f"tightened{suffix}")
        at_least(f"naive{suffix} (against tightened)", naive, tightened, infinite=True)
    at_least("pair_l2", certificate.pair_l2, pair_bound(certificate), infinite=True)
    if certificate.reference_sound:
        at_least("reference", certificate.reference, certificate.tightened, infinite=True)
    if certificate.attack is not None:
        at_least("tightened (against attack)", certificate.tightened, certificate.attack)
