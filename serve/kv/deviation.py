"""Certified deviation of attention over a compressed cache from attention over the full one.

Per query and head, from what ``summary.py`` remembers of the evicted keys and values. All figures
are bounds for the cached values as given (rounded outward in float64), never estimates.

Notation: M_S is the kept keys' total exp(logit), o_S their output; cluster c of evicted keys has
total M_c in [lower, upper] and mean output v_c; Z is the sum of all masses and
``o = (M_S o_S + sum M_c v_c) / Z`` the output of full attention; u is the output that was used:
o_S itself, or o_S merged with mean tokens. Source: project's notes on eviction bounds; derivations
below are our own.
"""

# Legend: R rows, K key/value heads, H query heads, G = H / K, C clusters, D head width, L layers.

from dataclasses import dataclass

import torch
from torch import Tensor

from serve.kv.summary import OUTWARD, Summary

ROUNDINGS = 8  # allowed units in the last place of outputs and log-sum-exps handed in
LOG_MAX = 600.0  # beyond it the evicted mass is 1 to the last digit
LOG_ROOM = 100.0  # lower ends are cut so far below it that their order cannot matter


@dataclass(frozen=True, slots=True)
class Masses:
    """What is known of the evicted keys of each cluster (R, K, G, C), float64.

    Attributes:
        lower: Lower bound on the logarithm of their total exp(logit), -inf for empty clusters.
        upper: Upper bound on it.
        tilt: Bound on ``sum_i |p_i - 1 / n|``, p their softmax weights among themselves.
    """

    lower: Tensor
    upper: Tensor
    tilt: Tensor


def cluster_masses(
    summary: Summary,
    scale: float,
    q_RKGD: Tensor,
    bias_sums: tuple[Tensor, Tensor] | None = None,
) -> Masses:
    """Bound the evicted mass of every cluster, and how unevenly it is spread.

    Centred logits ``y_i = scale q.(k_i - centre)`` have mean 0 and ``|y_i| <= a``, a = scale |q|
    times the radius. Without bias the mean of exp(y) is at least 1 (Jensen) and at most exp(a) and
    exp(a^2 / 2) (Hoeffding); weights of ratio at most exp(2 a) are ``2 tanh(a / 2)`` from uniform.
    A bias replaces the uniform weights 1 / n by w_i ~ exp(b_i), known exactly. By Cauchy-Schwarz
    ``sum |w_i - 1/n| <= d``, d^2 = n sum w_i^2 - 1; so the w-mean of y is within
    ``m = min(a, a d)`` of 0, log-mean-exp is in [-m, min(a, m + a^2 / 2)], and the triangle
    inequality adds d to the tilt.

    Args:
        summary: Of the rows.
        scale: Factor on the query-key product.
        q_RKGD: Queries after RoPE, float64.
        bias_sums: ``BiasTable.masses`` of the queries, None without bias.
    """
    # An empty cluster has log 0 = -inf, which outward rounding must not touch.
    count = summary.count[:, :, None]
    is_empty = count <= 0
    size = scale * q_RKGD.norm(dim=-1)[..., None]
    middle = scale * q_RKGD @ summary.key_centre.mT
    spread = size * summary.key_radius[:, :, None]
    # The rounding of q.c and of a centre is relative to sizes, not to a product that may cancel.
    size = size * summary.key_centre.norm(dim=-1)[:, :, None]
    tilt = 2 * (spread / 2).tanh()
    if bias_sums is None:
        lower = count.log() + middle
        upper = lower + torch.minimum(spread, spread.square() / 2)
    else:
        log_mass, squares = bias_sums
        uneven = (count * squares * (1 + 1e-12) - 1).clamp(min=0).sqrt().masked_fill(is_empty, 0.0)
        shift = spread * uneven.clamp(max=1)
        lower = log_mass + middle - shift
        lower = lower.masked_fill(uneven.isinf(), -torch.inf)
        upper = log_mass + middle + torch.minimum(spread, shift + spread.square() / 2)
        tilt = tilt + uneven
    slack = OUTWARD * (1 + size + spread + upper.abs().nan_to_num(posinf=0.0))
    lower = (lower - slack).masked_fill(is_empty, -torch.inf)
    upper = (upper + slack).masked_fill(is_empty, -torch.inf)
    return Masses(lower, upper, (tilt * (1 + OUTWARD)).clamp(max=2.0))


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention of some queries over the kept keys, as the engine computed it.

    Attributes:
        kept_RKGD: Outputs over the kept keys alone (o_S), with the rounding of their dtype.
        used_RKGD: Outputs that went on through the model (u).
        lse_RKG: Log-sum-exp of the kept logits.
        error_RKG: Bound on the rounding error of every kept logit.
        value_bound: Bound on the norm of every cached value, broadcastable to (R, K, G).
    """

    kept_RKGD: Tensor
    used_RKGD: Tensor
    lse_RKG: Tensor
    error_RKG: Tensor | float = 0.0
    value_bound: Tensor | float = 0.0


def head_deviation(summary: Summary, masses: Masses, attended: Attended) -> Tensor:
    """Bound |o - u| of every head, o the output of full attention and u the one used.

    With x_c = M_c - lower_c in [0, upper_c - lower_c] and |v_c - centre_c| <= r_c, r_c the value
    radius times min(1, tilt),

        Z (o - u) = M_S (o_S - u) + sum lower_c (centre_c - u) + sum x_c (centre_c - u)
                    + sum M_c (v_c - centre_c),

    so |o - u| <= (A + sum x_c (|centre_c - u| + r_c)) / (B + sum x_c) with A = |the first two
    terms| + sum lower_c r_c and B = M_S + sum lower_c. The right side is largest when the clusters
    of greatest reach are full and the others empty, so a sort finds the maximum over the box.
    For u merged from the same clusters the first two terms cancel: only spreads are left.

    With logits off by at most ``error`` (rounding that cancels), the log-sum-exp is off by as much,
    and the weights together by ``e^(2 error) - 1``, times values of norm up to ``value_bound``.
    Kernels may round weights to the dtype of the values.

    Returns:
        (R, H), float64; 0 where nothing is evicted.
    """
    lse_RKG, kept, used = (
        x.double() for x in (attended.lse_RKG, attended.kept_RKGD, attended.used_RKGD)
    )
    unit = torch.finfo(attended.lse_RKG.dtype).eps
    slack_RKG1 = (ROUNDINGS * unit * (1 + lse_RKG.abs()) + attended.error_RKG)[..., None]
    low = (masses.lower - lse_RKG[..., None] - slack_RKG1).clamp(max=LOG_MAX - LOG_ROOM).exp()
    high = (masses.upper - lse_RKG[..., None] + slack_RKG1).clamp(max=LOG_MAX).exp()
    slip = summary.value_radius[:, :, None] * masses.tilt.clamp(max=1.0)
    toward = summary.value_centre[:, :, None] - used[..., None, :]
    gap, size = toward.norm(dim=-1), used.norm(dim=-1)
    known = (kept - used + (low[..., None, :] @ toward)[..., 0, :]).norm(dim=-1)
    known = known + OUTWARD * (size + kept.norm(dim=-1) + (low * (gap + size[..., None])).sum(-1))
    # The kept output carries the rounding of its own dtype.
    unit = torch.finfo(attended.kept_RKGD.dtype).eps
    weights_moved = torch.as_tensor(2 * attended.error_RKG).clamp(max=1.1).expm1() + unit
    known = known + ROUNDINGS * unit * kept.norm(dim=-1) + attended.value_bound * weights_moved
    known = known + (low * slip).sum(-1)
    reach, order = (gap + slip).sort(dim=-1, descending=True)
    room = (high - low).clamp(min=0).gather(-1, order)
    weight = 1 + low.sum(-1)
    above = known[..., None] + (reach * room).cumsum(-1)
    below = weight[..., None] + room.cumsum(-1)
    bound = torch.maximum(known / weight, (above / below).amax(-1)) * (1 + OUTWARD)
    is_whole_RK1 = (summary.count <= 0).all(-1)[..., None]
    return bound.masked_fill(is_whole_RK1, 0.0).flatten(1)
