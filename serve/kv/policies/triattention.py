"""TriAttention: score a cached key by the logit its likely future queries would give it.

The unknown query is replaced by its calibrated centre, and the mean over geometric offsets of the
query position folds into one linear form, so a score is one dot product with the cached key. A
relative-position bias enters the same mean.
"""

# Legend: R request rows, K key/value heads, H query heads (the first ones have content), S slots,
# D head width, F = D / 2 rotary bands, T relative distances, O offsets.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from common.config import positive
from common.errors import BundleError
from serve.kernels import score_keys
from serve.kv.policy import Policy, register
from serve.kv.selection import is_protected, standardize
from serve.kv.view import CacheView

OFFSET_MAX = 65536


def query_offsets(offset_max: int | None, context: int) -> Tensor:
    """Return the future offsets 1, 2, 4, ... up to ``offset_max`` tokens (O,), int64.

    ``None`` means the smaller of 65536 and the largest power of two within the context.
    """
    largest = min(OFFSET_MAX, context) if offset_max is None else offset_max
    return 2 ** torch.arange(largest.bit_length())


def query_form(
    q_mean_HF2: Tensor, inverse_frequency_F: Tensor, positions_R: Tensor, offsets_O: Tensor
) -> Tensor:
    """Return the linear form whose product with a rotated key is the mean future logit.

    ``u_f = E[q_f] mean_o(exp(i w_f o)) exp(i w_f t)``: all phases in float64, since float32 loses
    the ranking at long positions.

    Args:
        q_mean_HF2: Mean query before RoPE, real and imaginary part per band.
        inverse_frequency_F: RoPE frequencies in radians per token, float64.
        positions_R: Position t of the next query of each row.
        offsets_O: Offsets from t, in tokens.

    Returns:
        (R, H, 2F) float64 in half pairing: real parts, then imaginary parts.
    """
    frequency_F = inverse_frequency_F.double()
    phase_OF = offsets_O.double()[:, None] * frequency_F
    filter_F = torch.polar(torch.ones_like(phase_OF), phase_OF).mean(0)
    phase_RF = positions_R.double()[:, None] * frequency_F
    turn_RF = torch.polar(torch.ones_like(phase_RF), phase_RF)
    centre_HF = torch.view_as_complex(q_mean_HF2.double().contiguous())
    u_RHF = centre_HF * (filter_F * turn_RF)[:, None]
    return torch.cat((u_RHF.real, u_RHF.imag), dim=-1)


def norm_weights(q_mean_HF2: Tensor, q_abs_HF: Tensor, kind: str) -> Tensor:
    """Return the weight (H, F) of each key band's modulus, float64.

    ``mlr``: E|q_f| - |E q_f|, the published term; ``full``: E|q_f|; ``none``: zero.
    """
    abs_HF = q_abs_HF.double()
    if kind == "mlr":
        return abs_HF - q_mean_HF2.double().norm(dim=-1)
    return abs_HF if kind == "full" else torch.zeros_like(abs_HF)


def mean_future_bias(bias_HT: Tensor, offsets_O: Tensor) -> Tensor:
    """Average the bias over the future offsets, for every distance of the next query.

    Entry d of the result is the mean of ``b(d + o)`` over the offsets with ``d + o < context``.
    Where none is left only the next query itself can attend, so its own bias ``b(d)`` stands.

    Returns:
        (H, context + 1), dtype of the bias; the last entry repeats the last distance.
    """
    context = bias_HT.shape[1]
    total = torch.zeros_like(bias_HT)
    count_T = torch.zeros(context, dtype=bias_HT.dtype, device=bias_HT.device)
    for offset in offsets_O[offsets_O < context].tolist():
        total[:, : context - offset] += bias_HT[:, offset:]
        count_T[: context - offset] += 1
    mean_HT = torch.where(count_T > 0, total / count_T.clamp(min=1), bias_HT)
    return torch.cat((mean_HT, mean_HT[:, -1:]), dim=1)


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class TriAttentionPolicy(Policy):
    """Keep the keys with the highest expected future logit.

    Attributes:
        offset_max: Largest future offset in tokens; None: see ``query_offsets``.
        norm_term: Part of the score that grows with the key norm; see ``norm_weights``.
        group: How the query heads of one key/value head are combined.

    Source:
        arXiv 2604.04921. Deviations: the offset sum in closed form; population deviation over
        evictable tokens; the largest offset bounded by the context; one set per layer and head;
        logits in the model's own scale, plus the mean of the relative-position bias.
    """

    offset_max: int | None = None
    norm_term: Literal["mlr", "none", "full"] = "mlr"
    group: Literal["max", "mean"] = "max"
    name: ClassVar[str] = "triattention"
    needs_stats: ClassVar[bool] = True
    is_standardized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.offset_max is not None:
            positive("kv.offset_max", self.offset_max)

    def score(self, view: CacheView) -> Tensor:
        """Return the z-score (R, K, S) of the mean future logit, combined over the group."""
        pos_RKS = view.slot_positions()
        rows, kv_heads, slots = pos_RKS.shape
        raw_RKGS = self.raw_scores(view).view(rows, kv_heads, -1, slots)
        raw_RKGS = raw_RKGS.masked_fill((pos_RKS < 0)[:, :, None], 0)
        protected = is_protected(self, pos_RKS, view.prompts_R)
        z_RKGS = standardize(raw_RKGS, (pos_RKS >= 0) & ~protected)
        return z_RKGS.amax(2) if self.group == "max" else z_RKGS.mean(2)

    def raw_scores(self, view: CacheView) -> Tensor:
        """Return the mean future logit plus the norm term (R, H, S); unfilled slots vary.

        Purely positional heads have no content: their score is the mean bias alone.

        Raises:
            BundleError: if the layer has content heads and no statistics.
        """
        offsets_O = query_offsets(self.offset_max, view.context).to(view.k_pool.device)
        pos_RKS = view.slot_positions()
        group = view.spec.group
        if view.spec.content_heads:
            raw_RHS = self._content_scores(view, offsets_O)
        else:
            raw_RHS = torch.zeros_like(pos_RKS, dtype=torch.float32).repeat_interleave(group, 1)
        if view.bias_LHT is None:
            return raw_RHS
        table_HT = mean_future_bias(view.bias_LHT.to(raw_RHS.dtype).flatten(0, 1), offsets_O)
        table_RHT = view.rows_of(table_HT.unflatten(0, view.bias_LHT.shape[:2]))
        distance_RKS = (view.positions_R[:, None, None] - pos_RKS).clamp(0, view.context)
        index_RHS = distance_RKS.repeat_interleave(group, dim=1)
        return raw_RHS + table_RHT.gather(2, index_RHS)

    def _content_scores(self, view: CacheView, offsets_O: Tensor) -> Tensor:
        if view.stats is None:
            raise BundleError(
                f"layers {list(view.layers)} have no calibration statistics; run lipllm calibrate"
            )
        spec, device = view.spec, view.k_pool.device
        q_mean_LHF2, q_abs_LHF = view.stats["q_mean"].to(device), view.stats["q_abs"].to(device)
        frequency_F = spec.inverse_frequency.to(device)
        positions_Q = view.positions_R[: view.requests]
        u_RHD = torch.cat(
            [query_form(mean, frequency_F, positions_Q, offsets_O) for mean in q_mean_LHF2]
        )
        e_LHF = norm_weights(q_mean_LHF2, q_abs_LHF, self.norm_term)
        # Positional heads share the pool but have no content: zero rows.
        extra = spec.heads - spec.content_heads
        u_RHD = torch.nn.functional.pad(spec.scale * u_RHD, (0, 0, 0, extra))
        e_RHF = view.rows_of(torch.nn.functional.pad(spec.scale * e_LHF, (0, 0, 0, extra)))
        tables, lengths = view.tables_RN, view.lengths_R
        return score_keys(view.k_pool, tables, lengths, u_RHD, e_RHF, backend=view.backend)
