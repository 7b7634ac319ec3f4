"""Trusted: what an attention block can do around computed tokens.

While token j is within ``e_j`` of its computed value, logits move by at most ``shift_ij``, so each
probability is known up to the factors ``exp(+-shift)`` over the normaliser; queries, keys and
values move by their matrices' norms times e. The Jacobian at any such point is that at the computed
tokens (exact attention gradient) plus a remainder bounded here per query and head.
Source: own derivation, docs/local.md; it fills what bound_tightening 5 leaves open.
"""

# Legend: T key token, I query token, C width, H query heads, D head width, M functionals,
# K kinds of size (0 per unit of perturbation, 1 rounding).

from typing import NamedTuple

import torch
from torch import Tensor

from common.norms import SLACK, gamma
from solvers.bounds.local.attention_centre import (
    FUNCTION_ERROR,
    AttentionCentre,
    AttentionMap,
    probabilities,
    product_movement,
    rotated,
)


class Spread(NamedTuple):
    """What is known of a block while tokens stay within reach: head outputs' gains."""

    weight_HIT: Tensor  # upper bounds on probabilities
    moved_HIT: Tensor  # bounds on their movement
    query_HI: Tensor  # remainder of the query path, per unit of the query token
    key_HIT: Tensor  # remainder of the key path, per unit of each key token


def attention_spread(block: AttentionMap, centre: AttentionCentre, reach_T: Tensor) -> Spread:
    """Bound what the block's Jacobian can be while token t moves by ``reach_T`` (l2)."""
    layer, content = block.layer, block.layer.content_heads
    q_HT, k_HT, v_HT = (
        norm_H[:, None] * reach_T * (1 + SLACK) + doubt_HT
        for norm_H, doubt_HT in (
            (block.q_norm_H, centre.q_doubt_HT),
            (block.k_norm_H, centre.k_doubt_HT),
            (block.v_norm_H[:content], centre.v_doubt_HT[:content]),
        )
    )
    q_size, k_size = centre.q_HTD.norm(dim=-1), centre.k_HTD.norm(dim=-1)
    shift_HIT = centre.logit_doubt_HIT.clone()
    shift_HIT[:content] += layer.logit_scale * product_movement(q_size, k_size, q_HT, k_HT)
    weight_HIT, moved_HIT = probabilities(centre.weight_HIT, shift_HIT * (1 + SLACK))
    plain_HIT = centre.weight_HIT[:content]
    upper_HIT, change_HIT = weight_HIT[:content], moved_HIT[:content]
    v_far, k_far = centre.v_far_HIT, centre.k_far_HIT
    v_size, k_big = centre.v_HTD[:content].norm(dim=-1).amax(-1), k_size.amax(-1)
    error = gamma(len(reach_T) + 64)
    # Means of the centred values and keys under the true probabilities.
    v_mean = (change_HIT * v_far).sum(-1) + 4 * error * v_size[:, None]
    k_mean = (change_HIT * k_far).sum(-1) + 4 * error * k_big[:, None]
    v_root, k_root = ((upper_HIT * far.square()).sum(-1).sqrt() for far in (v_far, k_far))
    v_move, k_move = (
        (upper_HIT * size_HT.square()[:, None]).sum(-1).sqrt() for size_HT in (v_HT, k_HT)
    )
    query_HI = (change_HIT * v_far * k_far).sum(-1) + v_mean * k_mean
    query_HI = query_HI + v_root * k_move + v_move * k_root + v_move * k_move
    query_HI = query_HI + 8 * error * (v_size * k_big)[:, None]
    drift = v_HT[:, None] + (v_mean + (upper_HIT * v_HT[:, None]).sum(-1))[..., None]
    key_HIT = q_size[..., None] * (change_HIT * v_far + upper_HIT * drift)
    key_HIT = key_HIT + q_HT[..., None] * upper_HIT * (v_far + drift)
    key_HIT = key_HIT + 8 * error * (q_size * v_size[:, None])[..., None] * plain_HIT
    scale = layer.logit_scale * (1 + 1e-9)
    return Spread(
        weight_HIT=weight_HIT,
        moved_HIT=moved_HIT,
        query_HI=scale * block.q_norm_H[:, None] * query_HI,
        key_HIT=scale * block.k_norm_H[:, None, None] * key_HIT,
    )


def attention_sizes(
    block: AttentionMap,
    centre: AttentionCentre,
    spread: Spread,
    size_KT: Tensor,
    value_path: float,
) -> Tensor:
    """Bound how far outputs move when token t moves by ``size_KT``, without rounding.

    Args:
        block: From ``attention_map``.
        centre: From ``attention_centre``.
        spread: From ``attention_spread``; both ends of the movement are within its reach.
        size_KT: l2 movements of the inputs, several alternatives K.
        value_path: Proved bound on ``|sum_h Wo_h Wv_h z_h|`` for ``|z_h| <= 1``.

    Returns:
        l2 movements of the outputs (K, T).
    """
    layer, content = block.layer, block.layer.content_heads
    largest_KT = size_KT.cummax(dim=-1).values
    mean_HKI = _mean(centre.weight_HIT + spread.moved_HIT, size_KT).minimum(largest_KT)
    value_KI = torch.minimum(
        value_path * mean_HKI.amax(0),
        block.output_norm * (block.v_norm_H[:, None, None] * mean_HKI).norm(dim=0),
    )
    plain_HIT = centre.weight_HIT[:content] * centre.v_far_HIT
    gain_HI = layer.logit_scale * block.q_norm_H[:, None] * centre.covariance_HIDD.norm(dim=(2, 3))
    query_HKI = (gain_HI + spread.query_HI)[:, None] * size_KT
    q_size_HI1 = centre.q_HTD.norm(dim=-1)[..., None]
    key_HIT = layer.logit_scale * block.k_norm_H[:, None, None] * q_size_HI1 * plain_HIT
    score_HKI = query_HKI + _mean(key_HIT + spread.key_HIT, size_KT)
    a, factor = layer.attn_residual, layer.attn_factor
    score_KI = block.output_norm * score_HKI.norm(dim=0)
    return ((1 - a) * size_KT + a * factor * (value_KI + score_KI)) * (1 + 1e-9)


def attention_rows(
    block: AttentionMap,
    centre: AttentionCentre,
    spread: Spread,
    rows_MIC: Tensor,
    size_KT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take functionals of the last I outputs of a prefix back to its T inputs.

    Args:
        block: From ``attention_map``.
        centre: From ``attention_centre``.
        spread: From ``attention_spread``.
        rows_MIC: Functionals of output tokens ``T - I .. T - 1``.
        size_KT: l2 movements of the input tokens ``0 .. T - 1``.

    Returns:
        Functionals of the inputs (M, T, C) under the Jacobian at the computed tokens, and a bound
        (K, M) on what is missing, rounding included.
    """
    layer, content = block.layer, block.layer.content_heads
    length = size_KT.shape[1]
    first = length - rows_MIC.shape[1]
    weight_HIT = centre.weight_HIT[:, first:length, :length]
    u_HMID = rows_MIC @ block.o_HCD[:, None]
    back_MTC = torch.zeros(len(rows_MIC), length, rows_MIC.shape[2], dtype=torch.float64)
    for h, u_MID in enumerate(u_HMID):
        back_MTC += (weight_HIT[h].T @ u_MID) @ block.v_HDC[h]
        if h < content:
            _add_score_path(block, centre, h, first, u_MID, back_MTC)
    a, factor = layer.attn_residual, layer.attn_factor
    back_MTC *= a * factor
    back_MTC[:, first:] += (1 - a) * rows_MIC
    gain_HKI = block.v_norm_H[:, None, None] * _mean(
        spread.moved_HIT[:, first:length, :length], size_KT
    )
    gain_HKI[:content] += _mean(spread.key_HIT[:, first:length, :length], size_KT)
    gain_HKI[:content] += spread.query_HI[:, None, first:length] * size_KT[:, first:]
    missing_KM = a * factor * torch.einsum("hmi,hki->km", u_HMID.norm(dim=-1), gain_HKI)
    lost_KM = _row_rounding(block, centre) * length * size_KT.amax(-1)[:, None]
    lost_KM = lost_KM * rows_MIC.norm(dim=-1).sum(-1)
    return back_MTC, missing_KM * (1 + 1e-9) + lost_KM


def _add_score_path(
    block: AttentionMap,
    centre: AttentionCentre,
    h: int,
    first: int,
    u_MID: Tensor,
    back_MTC: Tensor,
) -> None:
    """Add the query and the key path of one head to functionals of the inputs."""
    length, scale = back_MTC.shape[1], block.layer.logit_scale
    weight_IT = centre.weight_HIT[h, first:length, :length]
    seen_MIT = u_MID @ centre.v_HTD[h, :length].T
    seen_MIT = seen_MIT - (u_MID * centre.v_mean_HID[h, first:length]).sum(-1, keepdim=True)
    key_MTD = (weight_IT * seen_MIT).mT @ centre.q_HTD[h, first:length]
    query_MID = torch.einsum("mid,ide->mie", u_MID, centre.covariance_HIDD[h, first:length])
    positions = torch.arange(length)
    back_MTC += scale * (rotated(block, key_MTD, -positions) @ block.k_HDC[h])
    turned_MID = rotated(block, query_MID, -positions[first:])
    back_MTC[:, first:] += scale * (turned_MID @ block.q_HDC[h])


def _row_rounding(block: AttentionMap, centre: AttentionCentre) -> float:
    """Bound the rounding of a functional taken through the block, per key token and unit norm."""
    layer, content = block.layer, block.layer.content_heads
    entries = [part.norm(dim=(1, 2)) for part in (block.o_HCD, block.v_HDC)]
    gain_H = entries[0] * entries[1]
    if content:
        q_size, v_size = centre.q_HTD.norm(dim=-1).amax(-1), centre.v_HTD.norm(dim=-1).amax(-1)
        k_size = centre.k_HTD.norm(dim=-1).amax(-1)
        score = block.q_HDC.norm(dim=(1, 2)) * k_size + block.k_HDC.norm(dim=(1, 2)) * q_size
        gain_H[:content] += 4 * layer.logit_scale * entries[0][:content] * v_size[:content] * score
    length, width = centre.weight_HIT.shape[-1], block.o_HCD.shape[1]
    turned = (2 + length * max(1.0, float(block.frequency.max()))) * FUNCTION_ERROR
    rounding = gamma(4 * width + 4 * length + 64) + 4 * turned
    return rounding * (1 + layer.attn_factor * float(gain_H.sum()))


def _mean(weight_HIT: Tensor, size_KT: Tensor) -> Tensor:
    """Return ``sum_j weight_ij size_j`` (H, K, I)."""
    return torch.einsum("hij,kj->hki", weight_HIT, size_KT)
