"""Certified deviation of attention over a compressed cache from attention over the full one.

Per query and head, from what ``summary.py`` remembers of the evicted keys and values. All figures
are bounds for the cached values as given (rounded outward in float64), never estimates.

Notation: M_S is the kept keys' total exp(logit), o_S their output; cluster c of evicted keys has
total M_c in [lower, upper] and mean output v_c; Z is the sum of all masses and
``o = (M_S o_S + sum M_c v_c) / Z`` the output of full attention; u is the output that was used:
o_S itself, or o_S merged with mean tokens. Source: project's notes on eviction bounds; derivations
below are our own.
"""

# Legend: R rows, K key/value heads, H query heads, G = H / K, C clusters, D head width.

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.kv.bias import BiasMass
from serve.kv.summary import Clusters, outward

ROUNDINGS = 8  # allowed units in the last place of outputs and log-sum-exps handed in
FEW = 32  # units in the last place that cover short sums


@dataclass(frozen=True, slots=True)
class Masses:
    """What is known of the evicted keys of each cluster (R, K, G, C).

    Attributes:
        lower: Lower bound on the logarithm of their total exp(logit), -inf for empty clusters.
        upper: Upper bound on it.
        tilt: Bound on ``sum_i |p_i - 1 / n|``, p their softmax weights among themselves.
    """

    lower: Tensor
    upper: Tensor
    tilt: Tensor


def cluster_masses(
    clusters: Clusters,
    scale: float,
    q_RKGD: Tensor,
    bias: BiasMass | None = None,
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
        clusters: Of the rows.
        scale: Factor on the query-key product.
        q_RKGD: Queries after RoPE, in the dtype of the clusters.
        bias: Evicted masses of the queries' biases, None without.
    """
    out = outward(q_RKGD.dtype)
    q_RKGD = scale * q_RKGD
    length_RKG1 = q_RKGD.norm(dim=-1, keepdim=True)
    spread = length_RKG1 * clusters.key_radius[:, :, None]
    half_square = spread.square() / 2
    # The rounding of q.c and of a centre is relative to sizes, not to a product that may cancel.
    slack = out * (1 + 2 * length_RKG1 * clusters.key_norm[:, :, None] + spread)
    tilt = 2 * (spread / 2).tanh()
    middle = q_RKGD @ clusters.keys.mT
    if bias is None:
        lower = middle + clusters.log_count[:, :, None]
        upper = lower + torch.minimum(spread, half_square)
        slack = slack + out * clusters.log_count[:, :, None].clamp(min=0)
    else:
        count, dtype = clusters.count[:, :, None], middle.dtype
        uneven = (count * bias.squares * (1 + 1e-12) - 1).clamp(min=0).sqrt()
        uneven = uneven.masked_fill(count == 0, 0.0).to(dtype)
        slack = slack + out * bias.upper.abs().nan_to_num(posinf=0.0).to(dtype)
        shift = spread * uneven.clamp(max=1)
        lower = middle + bias.lower.to(dtype) - shift
        upper = middle + bias.upper.to(dtype) + torch.minimum(spread, shift + half_square)
        tilt = tilt + uneven
    # An empty cluster has log 0 = -inf, which finite slack leaves alone.
    return Masses(lower - slack, upper + slack, (tilt * (1 + out)).clamp(max=2.0))


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


def head_deviation(clusters: Clusters, masses: Masses, attended: Attended) -> Tensor:
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

    Returns:
        (R, H), in the dtype of the clusters; 0 where nothing is evicted.
    """
    dtype = clusters.values.dtype
    out, few = outward(dtype), FEW * torch.finfo(dtype).eps
    kept, used = attended.kept_RKGD.to(dtype), attended.used_RKGD.to(dtype)
    lse_RKG, unit = attended.lse_RKG, ROUNDINGS * torch.finfo(attended.lse_RKG.dtype).eps
    slack_RKG = unit * (1 + lse_RKG.abs()) + attended.error_RKG
    low, high = _relative(masses, lse_RKG, slack_RKG, dtype)
    slip = clusters.value_radius[:, :, None] * masses.tilt.clamp(max=1.0)
    size, norm = used.norm(dim=-1), clusters.value_norm[:, :, None]
    gap = _distance(clusters, used, size[..., None])
    weight = 1 + low.sum(-1)
    known = (kept - weight[..., None] * used + low @ clusters.values).norm(dim=-1)
    known = known + few * (kept.norm(dim=-1) + weight * size + (low * norm).sum(-1))
    # Sums round in the accumulator's dtype, weights and the output once in the cache's own.
    rounding = unit + torch.finfo(attended.kept_RKGD.dtype).eps
    weights_moved = torch.as_tensor(2 * attended.error_RKG).clamp(max=1.1).expm1() + rounding
    known = known + attended.value_bound * weights_moved + (low * slip).sum(-1)
    reach, order = (gap + slip).sort(dim=-1, descending=True)
    room = (high - low).clamp(min=0).gather(-1, order)
    above = known[..., None] + (reach * room).cumsum(-1)
    below = weight[..., None] + room.cumsum(-1)
    bound = torch.maximum(known / weight, (above / below).amax(-1)) * (1 + out)
    is_whole_RK1 = (clusters.count.sum(-1) == 0)[..., None]
    return bound.masked_fill(is_whole_RK1, 0.0).flatten(1)


def _distance(clusters: Clusters, used_RKGD: Tensor, size_RKG1: Tensor) -> Tensor:
    """Bound |centre_c - u| (R, K, G, C) without a tensor of differences.

    It only multiplies what is unknown of a mass, so that the digits lost by cancelling are no loss.
    """
    norm = clusters.value_norm[:, :, None]
    product = used_RKGD @ clusters.values.mT
    square = norm.square() + size_RKG1.square() - 2 * product
    unit = (used_RKGD.shape[3] + ROUNDINGS) * torch.finfo(product.dtype).eps
    error = unit * (norm + size_RKG1).square()
    return (square.clamp(min=0) + error).sqrt()


def _relative(
    masses: Masses, lse_RKG: Tensor, slack_RKG: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return lower and upper ends of M_c / M_S (R, K, G, C).

    Beyond ``most`` the kept keys do not count any more; lower ends are cut so far below it that
    every order of the clusters by mass remains possible.
    """
    most = 0.85 * math.log(torch.finfo(dtype).max)
    slack = slack_RKG + outward(dtype) * (1 + lse_RKG.abs())
    low = masses.lower - (lse_RKG + slack)[..., None].to(dtype)
    high = masses.upper - (lse_RKG - slack)[..., None].to(dtype)
    return low.clamp(max=most / 2).exp(), high.clamp(max=most).exp() * (1 + outward(dtype))
