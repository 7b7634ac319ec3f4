"""Certificates of whole networks: untrusted multipliers in, re-provable bounds out.

Each block is solved on the radius that the blocks before it have proved, and every number that is
stored comes from the functions the checker uses, moved up by its agreed margin.
"""

import dataclasses
import math
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.certificate import (
    KINDS,
    BlockProof,
    Certificate,
    config_sha256,
    log10_up,
    product_up,
    tensors_sha256,
)
from common.config import check_types, one_of, positive
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds.admissible import MULTIPLIER_RANGE, check_weights
from solvers.bounds.attention_search import AttentionSearch, search_attention
from solvers.bounds.checker import STORED_MARGIN, chain, most_heads, prove_block
from solvers.bounds.head_proof import head_norms
from solvers.bounds.kform import METHODS
from solvers.bounds.mlp_block import MlpSolution, tighten_mlp
from solvers.bounds.mlp_proof import mlp_form
from solvers.bounds.reference import reference_constants


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TightenSettings:
    """How the multipliers are searched.

    Attributes:
        method: One of ``solvers.bounds.kform.METHODS``.
        tol: Wanted duality gap relative to the block's first value.
        max_evals: Eigen-decompositions per search.
    """

    method: str = "halpern_anderson"
    tol: float = 0.01
    max_evals: int = 200

    def __post_init__(self) -> None:
        check_types(self)
        one_of("certify.method", self.method, METHODS)
        positive("certify.tol", self.tol)
        positive("certify.max_evals", self.max_evals, zero=True)


@torch.no_grad()
def certify(
    model: LipschitzTransformer,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
) -> Certificate:
    """Prove a bound on how far the logits can move when the embedded tokens move.

    Args:
        model: Weights of any floating type on any device, taken exactly as stored.
        tighten: Search multipliers; without it the tightened bounds equal the naive ones.
        settings: How to search.

    Returns:
        A certificate that ``verify`` accepts for exactly these weights.

    Raises:
        CertificateError: if a weight is NaN, infinite, or beyond ``admissible.WEIGHT_RANGE``.
    """
    settings = settings or TightenSettings()
    config, tensors = model.config, _state(model)
    check_weights(tensors)
    radius = naive_radius = model.domain_radius()
    references, ends = reference_constants(config, tensors)
    blocks: list[BlockProof] = []
    multipliers: dict[str, Tensor] = {}
    start = radius
    for index in _with_bar(range(2 * config.layers), shown=tighten):
        found, facts = _search(config, tensors, index, radius, settings) if tighten else ({}, {})
        block = _prove(config, tensors, index, (radius, naive_radius), found)
        if "dual" in facts:
            facts["dual"] = min(facts["dual"], block.tightened)
        block = dataclasses.replace(block, reference=references[index], **facts)
        radius, naive_radius = block.radius_out, block.naive_radius_out
        blocks.append(block)
        multipliers |= {block.key + name: tensor for name, tensor in found.items()}
    head, pair = head_norms(config, tensors["head.weight"])
    certificate = Certificate(
        width=config.width,
        vocab_size=config.vocab_size,
        radius=start,
        blocks=tuple(blocks),
        head_norm=_stored(head),
        pair_norm=_stored(pair),
        reference=product_up([*references, ends]),
        naive=0.0,
        tightened=0.0,
        log10_reference=log10_up([*references, ends]),
        log10_naive=0.0,
        log10_tightened=0.0,
        weights_sha256=tensors_sha256(tensors),
        config_sha256=config_sha256(config),
        multipliers_sha256=tensors_sha256(multipliers),
        multipliers=multipliers,
        settings={"tighten": tighten, **dataclasses.asdict(settings)},
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    return with_totals(certificate, single_head=most_heads(config) == 1)


def naive_bound(model: LipschitzTransformer) -> float:
    """Return the network bound from operator norms alone, embedding RMS to logits RMS."""
    return certify(model, tighten=False).naive


def with_totals(certificate: Certificate, *, single_head: bool) -> Certificate:
    """Return the certificate with its network bounds computed from its blocks and head."""
    naive, tightened = chain(certificate, "naive"), chain(certificate, "tightened")
    bound = _stored(product_up(tightened))
    return dataclasses.replace(
        certificate,
        naive=_stored(product_up(naive)),
        tightened=bound,
        log10_naive=log10_up(naive),
        log10_tightened=log10_up(tightened),
        reference_sound=single_head and certificate.reference >= bound,
    )


def _with_bar(indices: range, *, shown: bool) -> Iterable[int]:
    from rich.progress import track

    is_quiet = not shown or not sys.stdout.isatty()
    return track(indices, "certifying blocks", disable=is_quiet, transient=True)


def _prove(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    index: int,
    radii: tuple[float, float],
    multipliers: Mapping[str, Tensor],
) -> BlockProof:
    bound = prove_block(config, tensors, index, *radii, multipliers)
    return BlockProof(
        index=index,
        layer=index // 2,
        kind=KINDS[index % 2],
        reference=math.nan,
        naive=_stored(bound.naive),
        tightened=_stored(bound.tightened),
        radius_in=radii[0],
        radius_out=_stored(bound.radius_out),
        naive_radius_in=radii[1],
        naive_radius_out=_stored(bound.naive_radius_out),
        components=bound.components,
    )


def _search(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    index: int,
    radius: float,
    settings: TightenSettings,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return multipliers of a block and the solver's own account of them."""
    layer, prefix = config.layer(index // 2), f"layers.{index // 2}."
    options = dataclasses.asdict(settings)
    solution: AttentionSearch | MlpSolution
    if index % 2:
        up_FC, down_CF = (tensors[f"{prefix}mlp.{name}.weight"] for name in ("up", "down"))
        form = mlp_form(up_FC, down_CF, layer)
        solution = tighten_mlp(form.c_CC, form.b_CN, form.g_NC, **options)
        found, dual = {"lambda": solution.theta.exp()}, solution.dual
    else:
        names = ("query", "key", "value", "output")
        weights = [tensors.get(f"{prefix}attention.{name}.weight") for name in names]
        solution = search_attention(weights, layer, radius, **options)
        a, found = layer.attn_residual, solution.multipliers
        dual = (1 - a) + a * layer.attn_factor * solution.dual
    found = {name: tensor.clamp(*MULTIPLIER_RANGE) for name, tensor in found.items()}
    facts = {"evals": solution.evals, "seconds": solution.seconds, "method": settings.method}
    return found, {"dual": dual, **facts}


def _state(model: LipschitzTransformer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _stored(value: float) -> float:
    return value * (1 + STORED_MARGIN)
