"""Expected attention: Gaussian queries, fitted to those seen, at the positions to come."""

# Legend: L layers, R rows, K key/value heads, H query heads with content, G query heads of one,
# S slots, D head width, F rotated bands, T relative distances.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from common.config import positive
from serve.decoder import Decoder
from serve.kv.attention import largest_temporary
from serve.kv.observers import QueryMoments
from serve.kv.policy import Policy, register
from serve.kv.trigonometry import phasors, turned
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedAttentionPolicy(Policy):
    """Keep keys with a large expected weight times the norm of their value.

    Queries to come are Gaussian with mean and covariance of those seen, rotated by the mean RoPE
    of the next positions. The first ``sinks`` positions are neither used nor judged.

    Attributes:
        horizon: Number of these positions.
        use_covariance: Add half the variance of the logit to its mean.
        use_values: Multiply by the norm of the value.

    Source:
        arXiv 2510.00636 and the definition in its released library; deviations: the queries seen
        go on after the prompt; the mean relative-position bias over the horizon is added; the
        model's own softmax scale.
    """

    horizon: int = 512
    use_covariance: bool = True
    use_values: bool = True
    name: ClassVar[str] = "expected_attention"

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        positive("kv.horizon", self.horizon)

    def prefix_limit(self, prompt: int) -> int:
        """Return 0: the queries of all tokens count."""
        return 0

    def observer(self, decoder: Decoder) -> QueryMoments:
        """Return the moments of the queries after the sinks."""
        return QueryMoments(decoder, self.sinks)

    def score(self, view: CacheView) -> Tensor:
        """Return expected weight times value norm (R, K, S), float32 at least."""
        spec = view.spec
        pos_RKS, k_RKSD = view.slot_positions(), view.keys()
        dtype = torch.promote_types(k_RKSD.dtype, torch.float32)
        content = spec.content_heads // spec.group
        is_judged = (pos_RKS >= self.sinks)[:, :content, None]
        logits_RKGS = self._logits(view, k_RKSD[:, :content].to(dtype))
        if view.bias_LHT is not None:
            logits_RKGS += self._bias(view, pos_RKS[:, :content]).to(dtype)
        hidden = logits_RKGS.masked_fill(~is_judged, torch.finfo(dtype).min)
        score_RKS = hidden.softmax(-1).masked_fill(~is_judged, 0).mean(2)
        if self.use_values:
            score_RKS = score_RKS * view.values()[:, :content].to(dtype).norm(dim=-1)
        # Heads without content: not this policy's to judge.
        others = score_RKS.new_zeros(len(pos_RKS), spec.kv_heads - content, pos_RKS.shape[2])
        return torch.cat((score_RKS, others), dim=1)

    def _logits(self, view: CacheView, k_RKSD: Tensor) -> Tensor:
        """Return mean plus half the variance of the future logits (R, K, G, S)."""
        spec, seen, groups = view.spec, view.observed, (k_RKSD.shape[1], -1)
        mean_RHD, covariance_RHDD = _moments(view, self._rotation(view))
        mean_RKGD = (spec.scale * mean_RHD).to(k_RKSD).unflatten(1, groups)
        logits_RKGS = mean_RKGD @ k_RKSD.mT
        if not self.use_covariance:
            return logits_RKGS
        half_RKGDD = (spec.scale**2 / 2 * covariance_RHDD).to(k_RKSD).unflatten(1, groups)
        size = max(1, seen["total"].shape[1] * k_RKSD[0, 0].numel())
        part = max(1, largest_temporary(k_RKSD.device) // size)
        pieces = zip(k_RKSD.split(part), half_RKGDD.split(part), strict=True)
        squares = [((k[:, :, None] @ c) * k[:, :, None]).sum(-1) for k, c in pieces]
        return logits_RKGS + torch.cat(squares)

    def _rotation(self, view: CacheView) -> Tensor:
        """Return the mean RoPE factor of the next positions (R, F), complex."""
        frequency_F = view.spec.inverse_frequency.to(view.k_pool.device)
        ahead = torch.arange(self.horizon, device=view.k_pool.device)
        return phasors(frequency_F, view.positions_R) * phasors(frequency_F, ahead).mean(0)

    def _bias(self, view: CacheView, pos_RKS: Tensor) -> Tensor:
        """Return the mean bias over the future queries that the context allows (R, K, G, S)."""
        assert view.bias_LHT is not None
        bias_LHT, context = view.bias_LHT[:, : view.spec.content_heads].double(), view.context
        sums_LHT = torch.nn.functional.pad(bias_LHT.cumsum(-1), (1, 0))
        start_T = torch.arange(context, device=bias_LHT.device)
        stop_T = (start_T + self.horizon).clamp(max=context)
        mean_LHT = (sums_LHT[..., stop_T] - sums_LHT[..., start_T]) / (stop_T - start_T)
        distance_RKS = (view.positions_R[:, None, None] - pos_RKS).clamp(0, context - 1)
        table_RKGT = view.rows_of(mean_LHT).unflatten(1, (pos_RKS.shape[1], -1))
        index = distance_RKS[:, :, None].expand(-1, -1, view.spec.group, -1)
        return table_RKGT.gather(3, index)


def _moments(view: CacheView, rotation_RF: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (R, H, D) and covariance (R, H, D, D) of the queries to come, float64."""
    seen, options = view.observed, {"interleaved": view.spec.interleaved}
    count_R = seen["count"].clamp(min=1)
    mean_RHD = seen["total"] / count_R[:, None, None]
    covariance = seen["outer"] / count_R[:, None, None, None]
    covariance = covariance - mean_RHD[..., None] * mean_RHD[..., None, :]
    # The mean rotation acts on both axes: R C R'.
    covariance = turned(covariance, rotation_RF[:, None, None], **options).mT
    covariance = turned(covariance, rotation_RF[:, None, None], **options)
    return turned(mean_RHD, rotation_RF[:, None], **options), covariance
