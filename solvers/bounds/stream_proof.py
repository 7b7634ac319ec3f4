"""Trusted: what blocks do to the tokens of the stream and to their changes, one after the other.

Two ellipsoids travel along: ``domain`` holds every token, ``changes`` holds every change of a token
when each embedded token moves by at most 1. Both follow from multipliers alone; any are sound.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from common.certificate import KINDS, Certificate
from common.errors import CertificateError
from common.models import ModelConfig
from solvers.bounds.admissible import check_multipliers
from solvers.bounds.attention_proof import attention_image, prove_attention, split_heads
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.enclosure import Enclosure
from solvers.bounds.mlp_proof import BlockBound, mlp_form, mlp_image, part, prove_mlp

_LARGEST_POWER = 1000


class Stream(NamedTuple):
    """Where tokens and their changes lie between two blocks."""

    tokens: Tokens
    changes: Ellipsoid

    @classmethod
    def start(cls, width: int, radius: float) -> "Stream":
        """Return the state of the embedding: tokens in a ball, changes of norm at most 1."""
        return cls(Tokens.ball(width, radius), Ellipsoid.ball(width, 1.0))

    def at(self, radius: float, naive_radius: float) -> "Stream":
        """Return the same state with larger radii of the tokens' balls."""
        return self._replace(tokens=Tokens(self.tokens.domain, radius, naive_radius))


def prove_block(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    index: int,
    tokens: Tokens,
    multipliers: Mapping[str, Tensor],
) -> BlockBound:
    """Prove the constants of one residual block.

    Args:
        config: The model's configuration.
        tensors: The model's state, any floating types.
        index: Block, ``2 * layer`` for attention and ``2 * layer + 1`` for the MLP.
        tokens: Where the tokens that enter the block lie.
        multipliers: Local names to positive float64 vectors (see ``multiplier_shapes``), or empty
            for the bound from operator norms.

    Raises:
        CertificateError: for multipliers that are not usable, or NaN or infinity in a weight.
    """
    layer = config.layer(index // 2)
    check_multipliers(multipliers, layer, index)
    prove = prove_mlp if index % 2 else prove_attention
    bound = prove(local_tensors(tensors, index), layer, tokens, multipliers)
    if not math.isfinite(bound.naive + bound.naive_radius_out):
        raise CertificateError(f"block {index}: its bound overflows; the weights are too large")
    return bound


def advance(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    index: int,
    stream: Stream,
    multipliers: Mapping[str, Tensor],
) -> tuple[BlockBound, Stream]:
    """Prove one block and carry the stream through it; arguments as in ``prove_block``."""
    bound = prove_block(config, tensors, index, stream.tokens, multipliers)
    if multipliers:
        own = part(multipliers, "stream")
        changes = _image(config, local_tensors(tensors, index), index, stream, own)
    else:
        changes = stream.changes.times(bound.tightened)
    return bound, Stream(bound.tokens, changes)


def token_domains(
    config: ModelConfig, tensors: Mapping[str, Tensor], certificate: Certificate
) -> list[Tokens]:
    """Return where the tokens that enter each block lie."""
    domains = [Tokens.ball(config.width, certificate.radius)]
    for index in range(2 * config.layers - 1):
        own = certificate.block_multipliers(index)
        domains.append(prove_block(config, tensors, index, domains[-1], own).tokens)
    return domains


def logit_factors(config: ModelConfig, head_VC: Tensor, changes: Ellipsoid) -> list[float]:
    """Return factors whose product bounds the l2 norm of all changes of the logits."""
    norm = (Enclosure.exact(head_VC) @ changes.enclosed).norm()
    return [abs(config.final_scale), norm, *_powers(changes.exponent)]


def stream_factors(changes: Ellipsoid) -> list[float]:
    """Return factors whose product bounds the l2 norm of all changes of the stream."""
    return [changes.norm, *_powers(changes.exponent)]


def _powers(exponent: int) -> list[float]:
    """Return powers of two with the product ``2^exponent``, each within float64."""
    whole, rest = divmod(abs(exponent), _LARGEST_POWER)
    sign = -1 if exponent < 0 else 1
    return [2.0 ** (sign * _LARGEST_POWER)] * whole + [2.0 ** (sign * rest)]


def _image(
    config: ModelConfig,
    local: Mapping[str, Tensor],
    index: int,
    stream: Stream,
    multipliers: Mapping[str, Tensor],
) -> Ellipsoid:
    layer = config.layer(index // 2)
    if index % 2:
        form = mlp_form(local["up.weight"], local["down.weight"], layer)
        excess = float(multipliers["excess"])
        return mlp_image(form, stream.changes, multipliers["lambda"], excess)
    heads = split_heads(local, layer)
    return attention_image(heads, layer, stream.changes, stream.tokens.domain, multipliers)


def local_tensors(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the tensors of one block by their names within it."""
    prefix = f"layers.{index // 2}.{KINDS[index % 2]}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
