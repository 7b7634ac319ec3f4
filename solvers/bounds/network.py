"""Certificates of whole networks: untrusted multipliers in, re-provable bounds out.

Each block is solved on the radius that the blocks before it have proved, and every number that is
stored comes from the functions the checker uses, moved up by its agreed margin.
"""

import dataclasses
import logging
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

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
from common.errors import CertificateError
from common.models import LipschitzTransformer, ModelConfig
from solvers.bounds.admissible import check_weights
from solvers.bounds.checker import STORED_MARGIN, chain, logit_chain, most_heads, stream_chain
from solvers.bounds.ellipsoid import Ellipsoid
from solvers.bounds.head_proof import head_norms
from solvers.bounds.mlp_proof import BlockBound
from solvers.bounds.network_search import BlockFound, TightenSettings, search_network
from solvers.bounds.reference import reference_constants
from solvers.bounds.stream_proof import Stream, advance

log = logging.getLogger(__name__)

__all__ = ["TightenSettings", "certify", "naive_bound"]


@torch.no_grad()
def certify(
    model: LipschitzTransformer,
    tighten: bool = True,
    *,
    settings: TightenSettings | None = None,
    warm: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> Certificate:
    """Prove a bound on how far the logits can move when the embedded tokens move.

    Args:
        model: Weights of any floating type on any device, taken exactly as stored.
        tighten: Search multipliers; without it the tightened bounds equal the naive ones.
        settings: How to search.
        warm: Multipliers of a similar model to start from, see ``warm_multipliers``.

    Returns:
        A certificate that ``verify`` accepts for exactly these weights.

    Raises:
        CertificateError: if a weight is NaN, infinite, or beyond ``admissible.WEIGHT_RANGE``.
    """
    settings = settings or TightenSettings()
    config, tensors = model.config, _state(model)
    check_weights(tensors)
    radius, references = model.domain_radius(), reference_constants(config, tensors)
    chains = None
    if tighten:
        try:
            found = search_network(config, tensors, radius, settings, _with_bar, warm or {})
            chains = _prove_blocks(config, tensors, radius, references[0], found, settings.method)
        except (CertificateError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            log.warning("no multipliers can be proved (%s); norms alone are stored", error)
    if chains is None:
        nothing = [None] * (2 * config.layers)
        chains = _prove_blocks(config, tensors, radius, references[0], nothing)
    record = {"tighten": tighten, **asdict(settings)}
    return _assemble(config, tensors, radius, references, chains, record)


def naive_bound(model: LipschitzTransformer) -> float:
    """Return the network bound from operator norms alone, embedding RMS to logits RMS."""
    return certify(model, tighten=False).naive


class _Chains(NamedTuple):
    """Proofs of all blocks, the multipliers behind them, and where changes end up."""

    blocks: tuple[BlockProof, ...]
    multipliers: dict[str, Tensor]
    changes: Ellipsoid


def _prove_blocks(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    radius: float,
    references: Sequence[float],
    found: Sequence[BlockFound | None],
    method: str = "",
) -> _Chains:
    stream = Stream.start(config.width, radius)
    blocks: list[BlockProof] = []
    multipliers: dict[str, Tensor] = {}
    for index, block_found in enumerate(found):
        own = block_found.at(stream) if block_found else {}
        bound, after = advance(config, tensors, index, stream, own)
        block = _proof(index, bound, blocks, radius, references[index])
        if block_found:
            block = _with_account(block, block_found, method)
        blocks.append(block)
        multipliers |= {block.key + name: tensor for name, tensor in own.items()}
        stream = after.at(block.radius_out, block.naive_radius_out)
    return _Chains(tuple(blocks), multipliers, stream.changes)


def _assemble(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    radius: float,
    references: tuple[list[float], float],
    chains: _Chains,
    settings: Mapping[str, Any],
) -> Certificate:
    factors = [*references[0], references[1]]
    head, pair = head_norms(config, tensors["head.weight"])
    certificate = Certificate(
        width=config.width,
        vocab_size=config.vocab_size,
        radius=radius,
        blocks=chains.blocks,
        head_norm=_stored(head),
        pair_norm=_stored(pair),
        reference=product_up(factors),
        stream=0.0,
        naive=0.0,
        tightened=0.0,
        log10_reference=log10_up(factors),
        log10_naive=0.0,
        log10_tightened=0.0,
        weights_sha256=tensors_sha256(tensors),
        config_sha256=config_sha256(config),
        multipliers_sha256=tensors_sha256(chains.multipliers),
        multipliers=chains.multipliers,
        settings=settings,
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
    return _with_totals(certificate, config, tensors["head.weight"], chains.changes)


def _with_totals(
    certificate: Certificate, config: ModelConfig, head_VC: Tensor, changes: Ellipsoid
) -> Certificate:
    """Return the certificate with its network bounds, from its blocks and the stream's changes."""
    naive = chain(certificate, "naive")
    tightened = logit_chain(certificate, config, head_VC, changes)
    bound = _stored(product_up(tightened))
    return dataclasses.replace(
        certificate,
        stream=_stored(product_up(stream_chain(certificate, changes))),
        naive=_stored(product_up(naive)),
        tightened=bound,
        log10_naive=log10_up(naive),
        log10_tightened=log10_up([*tightened, 1 + STORED_MARGIN]),
        reference_sound=most_heads(config) == 1 and certificate.reference >= bound,
    )


def _with_bar(indices: Iterable[int]) -> Iterable[int]:
    from rich.progress import track

    is_quiet = not sys.stdout.isatty()
    return track(list(indices), "searching multipliers", disable=is_quiet, transient=True)


def _proof(
    index: int,
    bound: BlockBound,
    before: Sequence[BlockProof],
    radius: float,
    reference: float,
) -> BlockProof:
    return BlockProof(
        index=index,
        layer=index // 2,
        kind=KINDS[index % 2],
        reference=reference,
        naive=_stored(bound.naive),
        tightened=_stored(bound.tightened),
        radius_in=before[-1].radius_out if before else radius,
        radius_out=_stored(bound.radius_out),
        naive_radius_in=before[-1].naive_radius_out if before else radius,
        naive_radius_out=_stored(bound.naive_radius_out),
        components=bound.components,
    )


def _with_account(block: BlockProof, found: BlockFound, method: str) -> BlockProof:
    return dataclasses.replace(
        block,
        dual=min(found.dual, block.tightened),
        evals=found.evals,
        seconds=found.seconds,
        method=method,
    )


def _state(model: LipschitzTransformer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _stored(value: float) -> float:
    return value * (1 + STORED_MARGIN)
