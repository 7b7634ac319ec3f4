"""Trusted: an attention block evaluated at computed tokens, with all rounding accounted for.

Everything that ``attention`` needs of one forward pass, each with a bound on its distance from the
exact value. Source: own derivation, docs/local.md.
"""

# Legend: T key token, I query token, C width, H query heads, K KV heads, D head width, X = H * D.

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.models import LayerConfig, ModelConfig
from common.models.rope import inverse_frequencies
from common.norms import SLACK, UNIT, exact64, gamma, spectral_norm_bound

FUNCTION_ERROR = 2.0**-45
"""Allowance for exp, cos, sin and powers of the library, relative: 256 units in the last place."""

_UNDERFLOW = 1e-300
_WILD = 300.0  # logit movement beyond which nothing is claimed about a probability


class AttentionMap(NamedTuple):
    """A block's matrices by query head (KV heads repeated), float64, and certified norms."""

    layer: LayerConfig
    q_HDC: Tensor  # content heads only
    k_HDC: Tensor
    v_HDC: Tensor
    o_HCD: Tensor
    bias_HT: Tensor | None
    frequency: Tensor
    q_norm_H: Tensor
    k_norm_H: Tensor
    v_norm_H: Tensor
    output_norm: float


class AttentionCentre(NamedTuple):
    """The block at computed tokens."""

    q_HTD: Tensor  # content heads, rotated
    k_HTD: Tensor
    v_HTD: Tensor
    weight_HIT: Tensor
    q_doubt_HT: Tensor
    k_doubt_HT: Tensor
    v_doubt_HT: Tensor
    logit_doubt_HIT: Tensor
    v_far_HIT: Tensor  # |v_j - mean_i v|
    k_far_HIT: Tensor
    covariance_HIDD: Tensor  # of values and keys
    v_mean_HID: Tensor
    out_TC: Tensor
    fresh_T: Tensor


def attention_map(
    tensors: Mapping[str, Tensor], layer: LayerConfig, config: ModelConfig
) -> AttentionMap:
    """Split the weights of a block (any floating types) by query head."""
    dim, width = layer.head_dim, config.width
    v_KDC = exact64(tensors["value.weight"]).unflatten(0, (-1, dim))
    o_CX = exact64(tensors["output.weight"])
    q_HDC = k_KDC = v_KDC.new_zeros(0, dim, width)
    if layer.content_heads:
        q_HDC = exact64(tensors["query.weight"]).unflatten(0, (-1, dim))
        k_KDC = exact64(tensors["key.weight"]).unflatten(0, (-1, dim))
    bias = tensors.get("position_bias")
    return AttentionMap(
        layer=layer,
        q_HDC=q_HDC,
        k_HDC=k_KDC.repeat_interleave(layer.group, 0),
        v_HDC=v_KDC.repeat_interleave(layer.group, 0),
        o_HCD=o_CX.unflatten(1, (-1, dim)).transpose(0, 1).contiguous(),
        bias_HT=None if bias is None else exact64(bias),
        frequency=inverse_frequencies(dim, config.rope_theta, config.rope_dims),
        q_norm_H=_norms(q_HDC),
        k_norm_H=_norms(k_KDC).repeat_interleave(layer.group),
        v_norm_H=_norms(v_KDC).repeat_interleave(layer.group),
        output_norm=spectral_norm_bound(o_CX),
    )


def attention_centre(block: AttentionMap, x_TC: Tensor) -> AttentionCentre:
    """Evaluate the block at computed tokens and bound the rounding of everything in it."""
    layer, content, length = block.layer, block.layer.content_heads, len(x_TC)
    q_HTD, q_doubt_HT = _projected(block, block.q_HDC, x_TC, rotate=True)
    k_HTD, k_doubt_HT = _projected(block, block.k_HDC, x_TC, rotate=True)
    v_HTD, v_doubt_HT = _projected(block, block.v_HDC, x_TC, rotate=False)
    logits_HIT = x_TC.new_zeros(layer.heads, length, length)
    doubt_HIT = torch.zeros_like(logits_HIT)
    logits_HIT[:content] = layer.logit_scale * (q_HTD @ k_HTD.mT)
    q_size, k_size = (q_HTD.norm(dim=-1), k_HTD.norm(dim=-1))
    rounding = gamma(layer.head_dim + 8) * q_size[:, :, None] * k_size[:, None]
    moved = product_movement(q_size, k_size, q_doubt_HT, k_doubt_HT) + rounding
    doubt_HIT[:content] = layer.logit_scale * moved
    if block.bias_HT is not None:
        distance_IT = torch.arange(length)[:, None] - torch.arange(length)
        logits_HIT = logits_HIT + block.bias_HT[:, distance_IT.clamp(min=0)]
    doubt_HIT = (doubt_HIT + 2 * UNIT * logits_HIT.abs()) * (1 + SLACK)
    causal_IT = torch.ones(length, length).tril().bool()
    weight_HIT = logits_HIT.masked_fill(~causal_IT, -torch.inf).softmax(-1)
    doubt_HIT = doubt_HIT.masked_fill(~causal_IT, 0.0)
    v_mean_HID, k_mean_HID = weight_HIT @ v_HTD, weight_HIT[:content] @ k_HTD
    v_far_HIT = _distances(v_mean_HID[:content], v_HTD[:content])
    products = torch.einsum("hij,hjd,hje->hide", weight_HIT[:content], v_HTD[:content], k_HTD)
    a, factor = layer.attn_residual, layer.attn_factor
    mixed_TX = v_mean_HID.transpose(0, 1).flatten(1)
    out_TC = (1 - a) * x_TC + a * factor * (mixed_TX @ block.o_HCD.transpose(0, 1).flatten(1).T)
    centre = AttentionCentre(
        q_HTD=q_HTD,
        k_HTD=k_HTD,
        v_HTD=v_HTD,
        weight_HIT=weight_HIT,
        q_doubt_HT=q_doubt_HT,
        k_doubt_HT=k_doubt_HT,
        v_doubt_HT=v_doubt_HT,
        logit_doubt_HIT=doubt_HIT,
        v_far_HIT=v_far_HIT,
        k_far_HIT=_distances(k_mean_HID, k_HTD),
        covariance_HIDD=products - v_mean_HID[:content, :, :, None] * k_mean_HID[:, :, None],
        v_mean_HID=v_mean_HID,
        out_TC=out_TC,
        fresh_T=x_TC.new_zeros(length),
    )
    return centre._replace(fresh_T=_fresh(block, centre, x_TC))


def _projected(
    block: AttentionMap, w_HDC: Tensor, x_TC: Tensor, *, rotate: bool
) -> tuple[Tensor, Tensor]:
    """Return ``W x`` per head (H, T, D) and bounds on the l2 rounding error (H, T)."""
    y_HTD = x_TC @ w_HDC.mT
    size_HT = (x_TC.abs() @ w_HDC.abs().mT).norm(dim=-1)
    doubt_HT = gamma(x_TC.shape[1] + 16) * size_HT
    if not rotate:
        return y_HTD, doubt_HT
    positions = torch.arange(len(x_TC))
    angle_T = positions * max(1.0, float(block.frequency.max()))
    doubt_HT = doubt_HT + FUNCTION_ERROR * (2 + angle_T) * size_HT
    return rotated(block, y_HTD, positions), doubt_HT


def rotated(block: AttentionMap, y: Tensor, positions_T: Tensor) -> Tensor:
    """Rotate (..., T, D) by the angles of the positions; negative ones turn back."""
    angle_TF = positions_T.double()[:, None] * block.frequency
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    first, second = y.chunk(2, dim=-1)
    return torch.cat((first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF), dim=-1)


def product_movement(q_HT: Tensor, k_HT: Tensor, dq_HT: Tensor, dk_HT: Tensor) -> Tensor:
    """Bound the movement of ``q_i.k_j`` (H, I, T) from sizes and movements of both."""
    return (
        q_HT[:, :, None] * dk_HT[:, None]
        + dq_HT[:, :, None] * k_HT[:, None]
        + dq_HT[:, :, None] * dk_HT[:, None]
    )


def probabilities(weight_HIT: Tensor, shift_HIT: Tensor) -> tuple[Tensor, Tensor]:
    """Return upper bounds on the probabilities and bounds on their movement.

    Args:
        weight_HIT: Computed softmax.
        shift_HIT: Bounds on how far the true logits are from the computed ones.
    """
    wild_HI1 = shift_HIT.amax(-1, keepdim=True) > _WILD
    shift_HIT = shift_HIT.clamp(max=_WILD)
    own = (weight_HIT.shape[-1] + 64) * FUNCTION_ERROR
    causal_IT = torch.ones(weight_HIT.shape[-2:]).tril().double()
    most_HIT = weight_HIT * (1 + own) + _UNDERFLOW * causal_IT
    most_HIT = most_HIT * shift_HIT.exp() / (weight_HIT * (-shift_HIT).exp()).sum(-1, keepdim=True)
    least_HIT = weight_HIT * (-shift_HIT).exp()
    least_HIT = least_HIT / (weight_HIT * shift_HIT.exp()).sum(-1, keepdim=True)
    most_HIT = (most_HIT * (1 + 4 * own)).clamp(max=1.0)
    moved_HIT = torch.maximum(most_HIT - weight_HIT, weight_HIT - least_HIT * (1 - 4 * own))
    return (
        torch.where(wild_HI1, causal_IT, most_HIT),
        torch.where(wild_HI1, causal_IT, moved_HIT + own * weight_HIT),
    )


def _fresh(block: AttentionMap, centre: AttentionCentre, x_TC: Tensor) -> Tensor:
    """Bound the l2 rounding error of the computed outputs (T,)."""
    layer = block.layer
    weight_HIT, moved_HIT = probabilities(centre.weight_HIT, centre.logit_doubt_HIT)
    v_size_HT = centre.v_HTD.norm(dim=-1)
    error_HI = (moved_HIT * v_size_HT[:, None]).sum(-1)
    error_HI = error_HI + (weight_HIT * centre.v_doubt_HT[:, None]).sum(-1)
    size_HI = (weight_HIT * v_size_HT[:, None]).sum(-1)
    error_HI = error_HI + gamma(len(x_TC) + 16) * size_HI
    size_I = (block.o_HCD.norm(dim=(1, 2))[:, None] * size_HI).sum(0)
    rounding = gamma(layer.heads * layer.head_dim + 24)
    lost_I = block.output_norm * error_HI.norm(dim=0) + rounding * size_I
    a, factor = layer.attn_residual, layer.attn_factor
    return 1.01 * (a * factor * lost_I + gamma(8) * x_TC.norm(dim=1))


def _distances(mean_HID: Tensor, y_HTD: Tensor) -> Tensor:
    """Return ``|y_j - mean_i|`` (H, I, T) without cancellation."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(mean_HID, y_HTD, compute_mode=exact) * (1 + 1e-12)


def _norms(w_HDC: Tensor) -> Tensor:
    found = [spectral_norm_bound(w_DC) for w_DC in w_HDC]
    return torch.tensor(found, dtype=torch.float64) * (1 + SLACK)
