"""Trusted: the bound of an MLP block from multipliers, with all rounding accounted for.

Source: spec bound_tightening 2.2 (bound), 4.5 (growth of tokens), 7 (rounding); MaxMin: spec
lipschitz_training 10.6, with sums and differences of the pairs in place of the rotation.
"""

# Shape letters: C width, F MLP width, N multipliers (neurons, or pairs for MaxMin).

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from common.models import LayerConfig
from common.norms import (
    EIGEN_MARGIN,
    SLACK,
    TINY,
    UNIT,
    certified_top,
    exact64,
    gamma,
    round_up,
    schur_norm,
    spectral_norm_bound,
    weighted_gram,
)
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.enclosure import Enclosure
from solvers.bounds.slopes import (
    PHI_ERROR,
    apply,
    lipschitz_constant,
    sector_interval,
    slope_interval,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockBound:
    """What is proved of one block: constants, where tokens lie after it, parts, rounding margin."""

    naive: float
    tightened: float
    tokens: Tokens
    components: dict[str, float] = field(default_factory=dict)
    margin: float = 0.0

    @property
    def radius_out(self) -> float:
        """Bound on the l2 norm of every token after the block."""
        return self.tokens.radius

    @property
    def naive_radius_out(self) -> float:
        """The same from operator norms alone."""
        return self.tokens.naive_radius


class MlpForm(NamedTuple):
    """``J = c + b S g`` with diagonal ``|S| <= 1``; ``error`` bounds the rounding made in ``c``."""

    c_CC: Tensor
    b_CN: Tensor
    g_NC: Tensor
    error: float


def mlp_form(
    up_FC: Tensor, down_CF: Tensor, layer: LayerConfig, *, sector: bool = False
) -> MlpForm:
    """Write all difference quotients of an MLP block as ``C + B S G``.

    Args:
        up_FC: First matrix (F, C), any floating type.
        down_CF: Second matrix (C, F), any floating type.
        layer: Activation and residual weight.
        sector: Use the interval of ``phi(z) / z`` (growth from 0) instead of the slopes.

    Returns:
        Float64 matrices; N = F, or F / 2 for MaxMin (sum and difference of each pair).
    """
    up_FC, down_CF = exact64(up_FC), exact64(down_CF)
    interval = sector_interval if sector else slope_interval
    low, high = interval(layer.activation, layer.gelu_divisor)
    a, middle, reach = layer.mlp_residual, (low + high) / 2, (high - low) / 2 * (1 + SLACK)
    linear_FC, linear_CF, scale = up_FC, down_CF, a * middle
    if layer.activation == "maxmin":
        linear_FC, linear_CF = up_FC[::2] + up_FC[1::2], down_CF[:, ::2] + down_CF[:, 1::2]
        up_FC, down_CF = up_FC[::2] - up_FC[1::2], down_CF[:, ::2] - down_CF[:, 1::2]
        scale, reach = a / 2, reach / 2
    identity_CC = torch.eye(up_FC.shape[1], dtype=torch.float64) * (1 - a)
    c_CC = identity_CC + scale * (linear_CF @ linear_FC)
    size_CC = identity_CC + abs(scale) * (linear_CF.abs() @ linear_FC.abs())
    error = 1.01 * gamma(linear_FC.shape[0] + 12) * schur_norm(size_CC)
    return MlpForm(c_CC, a * reach * down_CF, up_FC, error)


def mlp_bound(form: MlpForm, lambda_N: Tensor) -> tuple[float, float]:
    """Bound ``|C + B S G|`` over all diagonal S with entries in [-1, 1].

    Args:
        form: From ``mlp_form``.
        lambda_N: Positive float64 multipliers, one per column of B; any are sound.

    Returns:
        The bound ``lambda_max [[G^T L G, C^T], [C, B L^-1 B^T]]`` and its relative margin.
    """
    inverse_N = (1 / lambda_N) * (1 + 4 * UNIT)
    x_CC, x_error = weighted_gram(form.g_NC, lambda_N)
    y_CC, y_error = weighted_gram(form.b_CN.T, inverse_N)
    k = torch.cat((torch.cat((x_CC, form.c_CC.T), 1), torch.cat((form.c_CC, y_CC), 1)))
    bound, margin = certified_top(k, max(x_error, y_error) + form.error)
    return round_up(bound), margin


def mlp_image(form: MlpForm, changes: Ellipsoid, lambda_N: Tensor, excess: float) -> Ellipsoid:
    """Return an ellipsoid that holds ``(C + B S G) v`` for all v of ``changes`` and all S.

    With ``v = F u`` and ``s I > U = F^T G^T L G F`` the support function is at most
    ``(y^T T y + s) / 2`` for ``T = C F (s I - U)^-1 F^T C^T + B L^-1 B^T``: the ellipsoid of
    ``s T``, as in ``attention_image``.

    Args:
        form: From ``mlp_form``.
        changes: Changes of one token, or tokens for a form of chords from 0.
        lambda_N: Positive float64 multipliers; any are sound.
        excess: Positive excess of s over the top eigenvalue of U.
    """
    move_CC = changes.enclosed
    rows_CN = (Enclosure.exact(form.g_NC) @ move_CC).scaled(lambda_N.sqrt()[:, None]).mT
    change_CC = rows_CN.gram()
    shift = round_up(max(change_CC.top(), 0.0) + excess)
    identity_CC = Enclosure.exact(torch.eye(len(move_CC.mid), dtype=torch.float64))
    room_CC = identity_CC.scaled(shift) + -change_CC
    linear_CC = Enclosure(form.c_CC, torch.tensor(form.error, dtype=torch.float64)) @ move_CC
    bent_CN = Enclosure.exact(form.b_CN)
    bent_CN = bent_CN._replace(error=4 * UNIT * bent_CN.size)
    shape_CC = linear_CC @ room_CC.inverse(excess / 2) @ linear_CC.mT
    shape_CC = shape_CC + bent_CN.scaled((1 / lambda_N).sqrt()).gram()
    return Ellipsoid.covering(shape_CC.scaled(shift), changes.exponent)


def prove_mlp(
    tensors: Mapping[str, Tensor],
    layer: LayerConfig,
    tokens: Tokens,
    multipliers: Mapping[str, Tensor],
) -> BlockBound:
    """Prove the constants of an MLP block; arguments as in ``prove_block``."""
    up_FC, down_CF, a = tensors["up.weight"], tensors["down.weight"], layer.mlp_residual
    norms = a * spectral_norm_bound(up_FC) * spectral_norm_bound(down_CF)
    naive = round_up((1 - a) + norms * lipschitz_constant(layer))
    sector = max(map(abs, sector_interval(layer.activation, layer.gelu_divisor)))
    naive_growth = naive if layer.mlp_bias else round_up((1 - a) + norms * sector)
    tight, margin, form = naive, EIGEN_MARGIN, mlp_form(up_FC, down_CF, layer)
    if multipliers:
        bound, margin = mlp_bound(form, multipliers["lambda"])
        tight = min(naive, bound)
    offset_C1 = value_at_zero(tensors, layer)
    offset = round_up(float(offset_C1.size + offset_C1.error)) if layer.mlp_bias else 0.0
    radius = grown(tokens.radius, min(naive_growth, tight), offset)
    domain = Ellipsoid.ball(len(down_CF), radius)
    if multipliers:
        if not layer.mlp_bias:
            form = mlp_form(up_FC, down_CF, layer, sector=True)
        own = part(multipliers, "domain")
        domain = mlp_image(form, tokens.domain, own["lambda"], float(own["excess"]))
        if layer.mlp_bias:
            domain = domain.plus(offset_C1)
    naive_radius = grown(tokens.naive_radius, naive_growth, offset)
    return BlockBound(
        naive=naive,
        tightened=tight,
        tokens=Tokens(domain, min(radius, domain.radius), naive_radius),
        components={"offset": offset},
        margin=margin,
    )


def grown(size: float, factor: float, offset: float = 0.0) -> float:
    """Return ``factor size + offset``, all at least 0, rounded up: 0 only where nothing is left."""
    return round_up((max(factor * size, TINY) if factor and size else 0.0) + offset)


def part(multipliers: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the multipliers of one of a block's proofs: those whose names begin with its own."""
    return {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in multipliers.items()
        if key.startswith(f"{name}.")
    }


def value_at_zero(tensors: Mapping[str, Tensor], layer: LayerConfig) -> Enclosure:
    """Enclose ``a (W_2 phi(b_1) + b_2)``, shape (C, 1)."""
    down_CF = exact64(tensors["down.weight"])
    if not layer.mlp_bias:
        return Enclosure.exact(down_CF.new_zeros(len(down_CF), 1))
    up_F, down_C = exact64(tensors["up.bias"]), exact64(tensors["down.bias"])
    hidden_F = apply(up_F, layer)
    size_C = down_CF.abs() @ (hidden_F.abs() + up_F.abs()) + down_C.abs()
    # Where a GELU cancels to nearly 0, its error is relative to the argument over the divisor.
    rounding = (PHI_ERROR / min(1.0, layer.gelu_divisor) + 2 * gamma(down_CF.shape[1] + 8)) * float(
        size_C.norm()
    )
    value_C = down_CF @ hidden_F + down_C
    error = torch.tensor(round_up(rounding), dtype=torch.float64)
    return Enclosure(value_C[:, None], error).scaled(layer.mlp_residual)
