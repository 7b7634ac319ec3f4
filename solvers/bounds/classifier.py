"""Certificates of image classifiers: untrusted multipliers in, re-provable bounds out."""

import dataclasses
import math
import platform
from typing import Any

import torch
from torch import Tensor

from common.certificate import config_sha256, log10_up, product_up, tensors_sha256
from common.classifier_certificate import ChainProof, ClassifierCertificate
from common.models import LipschitzMLP
from common.norms import rms_norm_factor, spectral_norm_bound
from solvers.bounds.admissible import check_weights
from solvers.bounds.chain_proof import CHAIN_RANGE, LONGEST_CHAIN, chain_form, chain_proves
from solvers.bounds.chain_search import tighten_chain
from solvers.bounds.checker import STORED_MARGIN
from solvers.bounds.classifier_checker import inside, matrices, pair_bound, pair_norm
from solvers.bounds.network import TightenSettings

METHOD = "newton_barrier"
# A proof needs a little more than the solver's value; beyond a thousandth it is not worth it.
_FIRST_STEP, _LAST_STEP = 1e-9, 1e-3


@torch.no_grad()
def certify_classifier(
    model: LipschitzMLP, tighten: bool = True, *, settings: TightenSettings | None = None
) -> ClassifierCertificate:
    """Prove a bound on how far the logits can move when the input moves, anywhere in R^I.

    Args:
        model: Weights of any floating type on any device, taken exactly as stored.
        tighten: Search multipliers; without it the tightened bounds equal the naive ones.
        settings: ``tol`` and ``max_evals`` (Newton steps) of the search; chains are solved by an
            interior-point method, whatever ``method`` says.

    Returns:
        A certificate that ``verify`` accepts for exactly these weights.

    Raises:
        CertificateError: if a weight is NaN, infinite, or beyond ``admissible.WEIGHT_RANGE``.
    """
    settings = settings or TightenSettings()
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    check_weights(tensors)
    weights = matrices(model.config, tensors)
    norms = [_stored(spectral_norm_bound(weight)) for weight in weights]
    blocks: list[ChainProof] = []
    multipliers: dict[str, Tensor] = {}
    for index, (first, stop) in enumerate(segments(len(weights))):
        naive = _stored(product_up(norms[first:stop]))
        block = ChainProof(
            index=index, layer=index, first=first, stop=stop, naive=naive, tightened=naive
        )
        if tighten and naive > 0:
            part = weights[first:stop]
            block, found = _tightened(block, part, model.activation, settings)
            multipliers |= found
        blocks.append(block)
    # The published certificate multiplies RMS to RMS norms.
    pairs = zip(weights, norms, strict=True)
    references = [rms_norm_factor(weight) * norm for weight, norm in pairs]
    certificate = ClassifierCertificate(
        inputs=model.sizes[0],
        classes=model.sizes[-1],
        blocks=tuple(blocks),
        norms=tuple(norms),
        pair_norm=_stored(pair_norm(weights[-1], norms[-1])),
        reference=product_up(references),
        log10_reference=log10_up(references),
        naive_l2=0.0,
        tightened_l2=0.0,
        pair_l2=0.0,
        naive=0.0,
        tightened=0.0,
        log10_naive=0.0,
        log10_tightened=0.0,
        weights_sha256=tensors_sha256(tensors),
        config_sha256=config_sha256(model.config),
        multipliers_sha256=tensors_sha256(multipliers),
        multipliers=multipliers,
        settings={"tighten": tighten, **dataclasses.asdict(settings)},
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    return _with_totals(certificate)


def segments(count: int) -> list[tuple[int, int]]:
    """Divide ``count`` matrices into few chains of similar length, ``(first, stop)`` each."""
    chains = math.ceil(count / LONGEST_CHAIN)
    ends = [round(count * (index + 1) / chains) for index in range(chains)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _tightened(
    block: ChainProof, weights: list[Tensor], activation: str, settings: TightenSettings
) -> tuple[ChainProof, dict[str, Tensor]]:
    """Return the block with the best bound that its multipliers prove, and the multipliers."""
    if len(weights) == 1:
        return block, {}
    solution = tighten_chain(
        weights, activation, tol=settings.tol / 2, max_evals=settings.max_evals
    )
    found = {
        f"{block.key}{index}": tensor.clamp(*CHAIN_RANGE)
        for index, tensor in zip(inside(block), solution.multipliers, strict=True)
    }
    form, joined, step = chain_form(weights, activation), torch.cat([*found.values()]), _FIRST_STEP
    while step <= _LAST_STEP:
        bound = solution.primal * (1 + step)
        if bound < block.naive and chain_proves(form, joined, bound) is not None:
            block = dataclasses.replace(
                block,
                tightened=_stored(bound),
                dual=min(solution.dual, bound),
                evals=solution.evals,
                seconds=solution.seconds,
                method=METHOD,
            )
            return block, found
        step *= 4
    return block, {}


def _with_totals(certificate: ClassifierCertificate) -> ClassifierCertificate:
    scale = certificate.scale
    naive = [*certificate.norms]
    tightened = [block.tightened for block in certificate.blocks]
    totals: dict[str, Any] = {}
    for name, factors in (("naive", naive), ("tightened", tightened)):
        totals[f"{name}_l2"] = _stored(product_up(factors))
        totals[name] = _stored(product_up([*factors, scale]))
        totals[f"log10_{name}"] = log10_up([*factors, scale])
    for name in ("naive", "naive_l2", "log10_naive"):
        # Equal products of unequal factors may differ in the last digit.
        totals[name] = max(totals[name], totals[name.replace("naive", "tightened")])
    certificate = dataclasses.replace(certificate, **totals)
    return dataclasses.replace(
        certificate,
        pair_l2=_stored(pair_bound(certificate)),
        reference_sound=certificate.reference >= certificate.tightened,
    )


def _stored(value: float) -> float:
    return value * (1 + STORED_MARGIN)
