"""Trusted: an MLP block around computed tokens, with all rounding accounted for.

The block is ``x -> linear x + outer psi(inner x + b) + const`` with an elementwise ``psi`` (``|t|``
of the differences for MaxMin). Around token t the difference quotients of neuron n lie in
``mid_tn +- spread_tn``, so that outputs move by ``(C_t + outer diag(spread_t) S inner) dx`` with
``C_t = linear + outer diag(mid_t) inner`` and diagonal ``|S| <= 1``.
Source: spec bound_tightening 5 (local), 2.2 (K-form), 7 (rounding); derivation in docs/local.md.
"""

# Legend: T token, C width, F MLP width, N neurons or MaxMin pairs, M functionals, K kinds of size
# (0 per unit of perturbation, 1 rounding).

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.models import LayerConfig
from common.norms import SLACK, UNIT, exact64, gamma, schur_norm, spectral_norm_bound
from solvers.bounds.mlp_proof import MlpForm, mlp_bound
from solvers.bounds.slopes import (
    PHI_ERROR,
    apply,
    chord_slopes,
    lipschitz_constant,
    local_slopes,
)


class MlpMap(NamedTuple):
    """A block's matrices, float64, and certified sizes of them."""

    layer: LayerConfig
    up_FC: Tensor
    down_CF: Tensor
    up_F: Tensor
    down_C: Tensor
    linear_CC: Tensor
    outer_CN: Tensor
    inner_NC: Tensor
    inner_norm: float
    inner_norms_N: Tensor
    rounding: float  # of a functional taken through the block, per unit of its norm


class MlpCentre(NamedTuple):
    """The block at computed tokens: pre-activations, next tokens, and their rounding."""

    rest_TN: Tensor
    doubt_TN: Tensor
    out_TC: Tensor
    fresh_T: Tensor


class Slopes(NamedTuple):
    """Difference quotients of every neuron around every token: ``mid +- spread``."""

    mid_TN: Tensor
    spread_TN: Tensor


def mlp_map(tensors: Mapping[str, Tensor], layer: LayerConfig) -> MlpMap:
    """Write a block with weights of any floating type as linear part and neurons."""
    up_FC, down_CF = exact64(tensors["up.weight"]), exact64(tensors["down.weight"])
    a = layer.mlp_residual
    inner_NC, outer_CN = up_FC, a * down_CF
    linear_CC = (1 - a) * torch.eye(down_CF.shape[0], dtype=torch.float64)
    if layer.activation == "maxmin":
        sums_NC, sums_CN = up_FC[::2] + up_FC[1::2], down_CF[:, ::2] + down_CF[:, 1::2]
        linear_CC = linear_CC + a / 2 * (sums_CN @ sums_NC)
        inner_NC = up_FC[::2] - up_FC[1::2]
        outer_CN = a / 2 * (down_CF[:, ::2] - down_CF[:, 1::2])
    width, hidden = up_FC.shape[1], up_FC.shape[0]
    zeros = torch.zeros(hidden + width, dtype=torch.float64)
    size = float(up_FC.norm()) * float(down_CF.norm()) * max(1.0, lipschitz_constant(layer))
    return MlpMap(
        layer=layer,
        up_FC=up_FC,
        down_CF=down_CF,
        up_F=exact64(tensors.get("up.bias", zeros[:hidden])),
        down_C=exact64(tensors.get("down.bias", zeros[hidden:])),
        linear_CC=linear_CC,
        outer_CN=outer_CN,
        inner_NC=inner_NC,
        inner_norm=spectral_norm_bound(inner_NC) * (1 + SLACK),
        inner_norms_N=inner_NC.norm(dim=1) * (1 + gamma(width + 8)),
        rounding=1.01 * gamma(4 * (width + hidden) + 64) * (1 + 4 * a * size),
    )


def mlp_centre(block: MlpMap, x_TC: Tensor) -> MlpCentre:
    """Evaluate the block at computed tokens and bound the l2 rounding error of each output."""
    layer, a = block.layer, block.layer.mlp_residual
    width, hidden = block.up_FC.shape[1], block.up_FC.shape[0]
    z_TF = x_TC @ block.up_FC.T + block.up_F
    doubt_TF = gamma(width + 8) * (x_TC.abs() @ block.up_FC.abs().T + block.up_F.abs())
    h_TF = apply(z_TF, layer)
    out_TC = (1 - a) * x_TC + a * (h_TF @ block.down_CF.T + block.down_C)
    rest_TN, doubt_TN, size_TF = z_TF, doubt_TF, z_TF.abs() + doubt_TF
    if layer.activation == "maxmin":
        pairs = doubt_TF.unflatten(-1, (-1, 2))
        rest_TN = z_TF[:, ::2] - z_TF[:, 1::2]
        doubt_TN = (pairs.sum(-1) + 2 * UNIT * rest_TN.abs()) * (1 + SLACK)
        doubt_TF, size_TF = (
            part.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)
            for part in (doubt_TF, size_TF)
        )
    phi_error = PHI_ERROR / min(1.0, layer.gelu_divisor)
    error_TF = lipschitz_constant(layer) * doubt_TF + phi_error * size_TF
    size_TC = h_TF.abs() @ block.down_CF.abs().T + block.down_C.abs()
    error_TC = a * (error_TF @ block.down_CF.abs().T) + gamma(hidden + 12) * (
        (1 - a) * x_TC.abs() + a * size_TC
    )
    return MlpCentre(rest_TN, doubt_TN, out_TC, error_TC.norm(dim=1) * 1.01)


def mlp_slopes(block: MlpMap, centre: MlpCentre, reach_T: Tensor, *, centred: bool) -> Slopes:
    """Bound the difference quotients of all neurons while token t moves by ``reach_T`` (l2).

    Args:
        block: From ``mlp_map``.
        centre: From ``mlp_centre``.
        reach_T: How far each computed token may be from the true one.
        centred: Only differences from the computed tokens; else between any two points.
    """
    layer = block.layer
    reach_TN = reach_T[:, None] * block.inner_norms_N * (1 + SLACK)
    options = (layer.activation, centre.rest_TN)
    if centred:
        low, high = chord_slopes(*options, centre.doubt_TN, reach_TN, layer.gelu_divisor)
    else:
        far_TN = (reach_TN + centre.doubt_TN) * (1 + SLACK)
        ends = (centre.rest_TN - far_TN, centre.rest_TN + far_TN)
        low, high = local_slopes(layer.activation, *ends, layer.gelu_divisor)
    size = 4 * UNIT * torch.maximum(low.abs(), high.abs()).clamp(min=1.0)
    spread_TN = torch.where(high > low, (high - low) / 2 + size, 0.0)
    return Slopes((low + high) / 2, spread_TN)


def mlp_constants(block: MlpMap, slopes: Slopes, lambda_N: Tensor, ceiling: float) -> Tensor:
    """Bound the l2 gain of the block around each token (T,) by the K-form.

    Args:
        block: From ``mlp_map``.
        slopes: From ``mlp_slopes``.
        lambda_N: Positive float64 multipliers shared by all tokens; each token's multiplies its
            spread, so that a neuron whose slope is known costs nothing.
        ceiling: A constant that is already proved.
    """
    size_CC = block.linear_CC.abs() + block.outer_CN.abs() @ block.inner_NC.abs() * float(
        slopes.mid_TN.abs().max()
    )
    error = block.rounding + 1.01 * gamma(block.inner_NC.shape[0] + 16) * schur_norm(size_CC)
    found = []
    for mid_N, spread_N in zip(*slopes, strict=True):
        live = spread_N > 0
        root_N = spread_N[live].sqrt()
        c_CC = block.linear_CC + (block.outer_CN * mid_N) @ block.inner_NC
        b_CN, g_NC = block.outer_CN[:, live] * root_N, block.inner_NC[live] * root_N[:, None]
        found.append(min(ceiling, mlp_bound(MlpForm(c_CC, b_CN, g_NC, error), lambda_N[live])[0]))
    return torch.tensor(found, dtype=torch.float64)


def mlp_rows(block: MlpMap, slopes: Slopes, rows_MTC: Tensor) -> tuple[Tensor, Tensor]:
    """Take functionals of the outputs back to the inputs.

    Args:
        block: From ``mlp_map``.
        slopes: Of the same tokens.
        rows_MTC: Functionals c of the outputs.

    Returns:
        ``c C_t`` (M, T, C), and per token (M, T) a bound on the norm of what is missing:
        ``c outer diag(spread) S inner`` and rounding.
    """
    seen_MTN = rows_MTC @ block.outer_CN
    back_MTC = rows_MTC @ block.linear_CC + (seen_MTN * slopes.mid_TN) @ block.inner_NC
    loose_MTN = seen_MTN.abs() * slopes.spread_TN
    missing_MT = torch.minimum(
        block.inner_norm * loose_MTN.norm(dim=-1), loose_MTN @ block.inner_norms_N
    )
    return back_MTC, missing_MT * (1 + 1e-9) + block.rounding * rows_MTC.norm(dim=-1)
