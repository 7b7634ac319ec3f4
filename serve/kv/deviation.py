"""Certified deviation of attention over a compressed cache from attention over the full one.

When keys are evicted, a summary per cluster of positions remains: count, centre and radius of the
keys after RoPE and of the values, and which positions are gone. At a decode step it bounds the
attention mass and the output that the evicted keys would have contributed; the certificate of the
model carries that to the logits. All figures are bounds for the cached values as given (rounded
outward in float64), never estimates.
"""

# Legend: R rows (sequences, or tokens of one), K key/value heads, H query heads, G = H / K,
# C clusters, S slots, D head width, T original positions, L layers.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models import LipschitzTransformer
from common.norms import spectral_norm_bound

OUTWARD = 1e-11  # relative; covers a few thousand float64 roundings
ROUNDINGS = 8  # allowed units in the last place of outputs and log-sum-exps handed in
LOG_MAX = 600.0  # beyond it the evicted mass is 1 to the last digit


@dataclass(slots=True)
class Summary:
    """What is remembered of the evicted keys of one layer, for all rows; float64.

    Attributes:
        count: Evicted tokens (R, K, C).
        key_centre: Mean evicted key (R, K, C, D).
        key_radius: Largest distance of an evicted key from the centre (R, K, C).
        value_centre: Mean evicted value (R, K, C, D).
        value_radius: Largest distance of an evicted value from its centre (R, K, C).
        is_gone: Evicted positions (R, K, T), bool.
    """

    count: Tensor
    key_centre: Tensor
    key_radius: Tensor
    value_centre: Tensor
    value_radius: Tensor
    is_gone: Tensor

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], width: int, context: int, device: torch.device
    ) -> "Summary":
        """Return the summary of no evictions for ``shape`` = (R, K, C)."""
        zeros = torch.zeros(*shape, dtype=torch.float64, device=device)
        centre = torch.zeros(*shape, width, dtype=torch.float64, device=device)
        is_gone = torch.zeros(*shape[:2], context, dtype=torch.bool, device=device)
        return cls(zeros, centre, zeros.clone(), centre.clone(), zeros.clone(), is_gone)

    def fields(self) -> tuple[Tensor, ...]:
        """Return the tensors in declaration order."""
        return (
            self.count,
            self.key_centre,
            self.key_radius,
            self.value_centre,
            self.value_radius,
            self.is_gone,
        )

    def take(self, rows: Tensor) -> "Summary":
        """Return a copy of some rows."""
        return Summary(*(field[rows] for field in self.fields()))

    def put(self, rows: Tensor, other: "Summary") -> None:
        """Overwrite some rows."""
        for field, value in zip(self.fields(), other.fields(), strict=True):
            field[rows] = value

    def add(
        self, k_RKSD: Tensor, v_RKSD: Tensor, positions_RKS: Tensor, is_gone_RKS: Tensor
    ) -> None:
        """Add evicted slots to the summary.

        Args:
            k_RKSD: Keys after RoPE.
            v_RKSD: Values.
            positions_RKS: Original positions; any value where nothing is evicted.
            is_gone_RKS: Which slots are evicted now.
        """
        clusters, context = self.count.shape[2], self.is_gone.shape[2]
        where_RKS = positions_RKS.clamp(0, context - 1)
        cluster_RKS = where_RKS // segment_length(context, clusters)
        member_RKSC = F.one_hot(cluster_RKS, clusters).double() * is_gone_RKS[..., None]
        old_count = self.count.clone()
        self.count += member_RKSC.sum(2)
        for x_RKSD, centre, radius in (
            (k_RKSD.double(), self.key_centre, self.key_radius),
            (v_RKSD.double(), self.value_centre, self.value_radius),
        ):
            total = old_count[..., None] * centre + member_RKSC.mT @ x_RKSD
            moved = total / self.count.clamp(min=1)[..., None]
            # The old ball, seen from the new centre, grows by the shift.
            shifted = torch.where(old_count > 0, radius + (moved - centre).norm(dim=-1), 0)
            index = cluster_RKS[..., None].expand_as(x_RKSD)
            far_RKS = (x_RKSD - moved.gather(2, index)).norm(dim=-1) * is_gone_RKS
            reached = shifted.scatter_reduce(2, cluster_RKS, far_RKS, "amax")
            centre.copy_(moved)
            radius.copy_(reached * (1 + OUTWARD))
        self.is_gone |= torch.zeros_like(self.is_gone).scatter_reduce(
            2, where_RKS, is_gone_RKS, "amax"
        )


def segment_length(context: int, clusters: int) -> int:
    """Return the positions per cluster; the last cluster may be shorter."""
    return -(-context // clusters)


@dataclass(frozen=True, slots=True)
class BiasTable:
    """Exponentials of a relative-position bias, laid out by original position.

    Attributes:
        windows: View (T, H, T), float64: entry (T - 1 - t, h, p) is exp(b_h(t - p) - peak_h),
            0 for p > t.
        peak_H: Largest bias of each head (H,).
    """

    windows: Tensor
    peak_H: Tensor

    @classmethod
    def of(cls, bias_HT: Tensor) -> "BiasTable":
        """Prepare a float64 table (H, context); what would underflow is rounded up."""
        context = bias_HT.shape[1]
        peak_H = bias_HT.amax(1)
        exp_HT = (bias_HT - peak_H[:, None]).clamp(min=-LOG_MAX).exp()
        padded = F.pad(exp_HT.flip(1), (0, context - 1))
        return cls(padded.unfold(1, context, 1).transpose(0, 1), peak_H)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConstants:
    """What the bound needs of one attention block.

    Attributes:
        gain: Residual weight times attention factor.
        scale: Factor on the query-key product.
        bias: Relative-position bias, prepared for sums over evicted positions, or None.
        norm_bound: Bound on the spectral norm of the output matrix.
        head_norm_bounds: The same for each head's columns (H,), float64.
    """

    gain: float
    scale: float
    bias: BiasTable | None
    norm_bound: float
    head_norm_bounds: Tensor

    @classmethod
    def of(cls, model: LipschitzTransformer, index: int) -> "AttentionConstants":
        """Read the constants of one layer; norms are certified upper bounds."""
        attention = model.layers[index].attention
        layer, bias = attention.layer, attention.position_bias
        weight_OI = attention.output.weight
        heads = [spectral_norm_bound(w) for w in weight_OI.split(layer.head_dim, dim=1)]
        return cls(
            gain=layer.attn_residual * layer.attn_factor,
            scale=layer.logit_scale,
            bias=None if bias is None else BiasTable.of(bias.detach().double()),
            norm_bound=spectral_norm_bound(weight_OI),
            head_norm_bounds=torch.tensor(heads, dtype=torch.float64, device=weight_OI.device),
        )

    def block_deviation(self, head_RH: Tensor) -> Tensor:
        """Bound the l2 movement (R,) of the stream from that of each head's output (R, H)."""
        joint = self.norm_bound * head_RH.norm(dim=1)
        return self.gain * (1 + OUTWARD) * torch.minimum(joint, head_RH @ self.head_norm_bounds)


def log_mass_bound(
    summary: Summary, constants: AttentionConstants, q_RKGD: Tensor, positions_R: Tensor
) -> Tensor:
    """Bound the logarithm of the evicted keys' total exp(logit), per cluster.

    With centre c and radius r of the evicted keys, ``a = scale |q| r``: every logit is at most
    ``scale q.c + a + bias``, and with uniform weights the mean of exp is at most
    ``exp(scale q.c + a^2 / 2)`` (Hoeffding). Both hold; the smaller is returned.

    Returns:
        (R, K, G, C), float64; -inf for empty clusters.
    """
    count = summary.count[:, :, None]
    middle = constants.scale * q_RKGD @ summary.key_centre.mT
    spread = constants.scale * q_RKGD.norm(dim=-1)[..., None] * summary.key_radius[:, :, None]
    # The rounding of q.c and of a centre is relative to sizes, not to a product that may cancel.
    size = constants.scale * q_RKGD.norm(dim=-1)[..., None]
    size = size * summary.key_centre.norm(dim=-1)[:, :, None]
    squared = torch.minimum(spread, spread.square() / 2)
    if constants.bias is None:
        total, worst = count.log().expand_as(middle), torch.zeros_like(middle)
    else:
        total, worst = _bias_mass(summary, constants, positions_R)
    bound = middle + torch.minimum(total + spread, count.log() + worst + squared)
    # An empty cluster has log 0 = -inf, which outward rounding must not touch.
    slack = OUTWARD * (1 + size + spread + bound.abs().nan_to_num(posinf=0.0))
    return torch.where(count > 0, bound + slack, -torch.inf)


def head_deviation(
    summary: Summary,
    log_mass: Tensor,
    o_RKGD: Tensor,
    lse_RKG: Tensor,
    error_RKG: Tensor | float = 0.0,
    value_bound: float = 0.0,
) -> Tensor:
    """Bound |o - o'| of every head, o' the output over the kept keys.

    ``o - o' = sum_c eps_c (v_c - o')`` with v_c in the value ball of cluster c and masses
    ``eps_c = M_c / (M_kept + sum M)``. Over all M_c up to their bounds this is largest when the
    clusters farthest from o' are full and the others empty, so a sort finds the maximum.
    With logits off by at most ``error`` (rounding that cancels), the log-sum-exp is off by as much,
    and the weights together by ``e^(2 error) - 1``, times values of norm up to ``value_bound``.

    Returns:
        (R, H), float64.
    """
    lowest_RKG = lse_RKG.double() - ROUNDINGS * torch.finfo(lse_RKG.dtype).eps * (1 + lse_RKG.abs())
    lowest_RKG = lowest_RKG - error_RKG
    log_ratio = (log_mass - lowest_RKG[..., None]).clamp(max=LOG_MAX)
    gap = (summary.value_centre[:, :, None] - o_RKGD[..., None, :].double()).norm(dim=-1)
    # The output carries the rounding of its own dtype, the reach allows for it.
    rounding = ROUNDINGS * torch.finfo(o_RKGD.dtype).eps * o_RKGD.double().norm(dim=-1)
    # The weights move by 2 in sum at most, however large the error.
    rounding = rounding + value_bound * torch.as_tensor(2 * error_RKG).clamp(max=1.1).expm1()
    reach = gap + summary.value_radius[:, :, None] + rounding[..., None]
    reach, order = reach.sort(dim=-1, descending=True)
    ratio = log_ratio.exp().gather(-1, order)
    bound = (reach * ratio).cumsum(-1) / (1 + ratio.cumsum(-1))
    return (bound.amax(-1) * (1 + OUTWARD)).flatten(1)


def _bias_mass(
    summary: Summary, constants: AttentionConstants, positions_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log sum exp and maximum of the bias over each cluster's gone positions."""
    assert constants.bias is not None
    rows, kv_heads, clusters = summary.count.shape
    context = summary.is_gone.shape[2]
    window_RHT = constants.bias.windows.index_select(0, context - 1 - positions_R)
    lost = window_RHT.view(rows, kv_heads, -1, context) * summary.is_gone[:, :, None]
    pad = segment_length(context, clusters) * clusters - context
    lost = (F.pad(lost, (0, pad)) if pad else lost).unflatten(-1, (clusters, -1))
    peak = constants.bias.peak_H.view(kv_heads, -1, 1)
    return lost.sum(-1).log() + peak, lost.amax(-1).log() + peak
