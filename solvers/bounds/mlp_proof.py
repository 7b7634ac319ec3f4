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
    UNIT,
    certified_top,
    exact64,
    gamma,
    round_up,
    schur_norm,
    spectral_norm_bound,
    weighted_gram,
)
from solvers.bounds.slopes import (
    PHI_ERROR,
    apply,
    lipschitz_constant,
    sector_interval,
    slope_interval,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockBound:
    """What is proved of one block: constants, token norms after it, parts, rounding margin."""

    naive: float
    tightened: float
    radius_out: float
    naive_radius_out: float
    components: dict[str, float] = field(default_factory=dict)
    margin: float = 0.0


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


def prove_mlp(
    tensors: Mapping[str, Tensor],
    layer: LayerConfig,
    radius: float,
    naive_radius: float,
    multipliers: Mapping[str, Tensor],
) -> BlockBound:
    """Prove the constants of an MLP block; arguments as in ``prove_block``."""
    up_FC, down_CF, a = tensors["up.weight"], tensors["down.weight"], layer.mlp_residual
    norms = spectral_norm_bound(up_FC) * spectral_norm_bound(down_CF)
    naive = round_up((1 - a) + a * norms * lipschitz_constant(layer))
    sector = max(map(abs, sector_interval(layer.activation, layer.gelu_divisor)))
    growth = round_up((1 - a) + a * norms * sector)
    offset, tight, tight_growth, margin = 0.0, naive, growth, EIGEN_MARGIN
    if layer.mlp_bias:
        offset, growth = round_up(a * _norm_at_zero(tensors, layer)), naive
    if multipliers:
        lambda_N = multipliers["lambda"]
        bound, margin = mlp_bound(mlp_form(up_FC, down_CF, layer), lambda_N)
        tight = min(naive, bound)
        if not layer.mlp_bias and sector_interval(
            layer.activation, layer.gelu_divisor
        ) != slope_interval(layer.activation, layer.gelu_divisor):
            sector_form = mlp_form(up_FC, down_CF, layer, sector=True)
            tight_growth = min(growth, mlp_bound(sector_form, lambda_N)[0])
    tight_growth = tight if layer.mlp_bias else min(tight_growth, tight)
    return BlockBound(
        naive=naive,
        tightened=tight,
        radius_out=round_up(tight_growth * radius + offset),
        naive_radius_out=round_up(growth * naive_radius + offset),
        components={"offset": offset, "growth": tight_growth},
        margin=margin,
    )


def _norm_at_zero(tensors: Mapping[str, Tensor], layer: LayerConfig) -> float:
    """Bound ``|W_2 phi(b_1) + b_2|_2``."""
    up_F, down_C = exact64(tensors["up.bias"]), exact64(tensors["down.bias"])
    down_CF = exact64(tensors["down.weight"])
    hidden_F = apply(up_F, layer)
    size_C = down_CF.abs() @ (hidden_F.abs() + up_F.abs()) + down_C.abs()
    # Where a GELU cancels to nearly 0, its error is relative to the argument over the divisor.
    rounding = (PHI_ERROR / min(1.0, layer.gelu_divisor) + 2 * gamma(down_CF.shape[1] + 8)) * float(
        size_C.norm()
    )
    return round_up(float((down_CF @ hidden_F + down_C).norm()) + rounding)
