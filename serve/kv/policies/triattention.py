"""TriAttention: score a cached key by the logit its likely future queries would give it.

The unknown query is replaced by its calibrated centre, and the mean over geometric offsets of the
query position folds into one linear form, so a score is one dot product with the cached key. A
relative-position bias enters the same mean.
"""

# Legend: L layers, R rows (layer-major), Q requests, K key/value heads, H query heads (the first
# ones have content), S slots, D head width, F rotated bands, E = D - F weights, P = D - 2F
# unrotated components, T relative distances, O offsets.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import positive
from common.errors import BundleError
from serve.kernels import score_keys
from serve.kernels.reference import rotary_parts
from serve.kv.policy import Policy, register
from serve.kv.selection import is_protected, standardize
from serve.kv.trigonometry import (
    later_bias,
    mean_future_bias,
    norm_weights,
    query_form,
    query_offsets,
)
from serve.kv.view import CacheView


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class TriAttentionPolicy(Policy):
    """Keep the keys with the highest expected future logit.

    Attributes:
        offset_max: Largest future offset in tokens; None: see ``query_offsets``.
        aggregation: Over the offsets: their mean (one linear form), or the largest logit (one
            pass over the keys per offset).
        norm_term: Part of the score that grows with the key norm: ``mlr`` (published), ``full``
            and ``none`` as in ``norm_weights``; ``gaussian``: half the variance of the logit if
            each band's whole variance lay along the key, as log E exp(logit) of Gaussian queries
            has it, in the model's own scale.
        group: How the query heads of one key/value head are combined.
        normalize: Standardize the scores of each query head over the evictable tokens.
        score_pass_through: Let the components that RoPE leaves alone take part.

    Source:
        arXiv 2604.04921. Deviations: the offset sum in closed form; population deviation over
        evictable tokens; the largest offset bounded by the context; one set per layer and head;
        logits in the model's own scale, plus the mean of the relative-position bias; unrotated
        components, which the paper does not treat.
    """

    offset_max: int | None = None
    aggregation: Literal["mean", "max"] = "mean"
    norm_term: Literal["mlr", "none", "full", "gaussian"] = "mlr"
    group: Literal["max", "mean"] = "max"
    normalize: bool = True
    score_pass_through: bool = True
    name: ClassVar[str] = "triattention"
    needs_stats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if self.offset_max is not None:
            positive("kv.offset_max", self.offset_max)

    @property
    def is_standardized(self) -> bool:
        """True where the scores are: then heads and layers can be compared."""
        return self.normalize

    def score(self, view: CacheView) -> Tensor:
        """Return the mean future logit (R, K, S), z-scored per head, combined over the group."""
        pos_RKS = view.slot_positions()
        raw_RKGS = self.raw_scores(view).unflatten(1, (pos_RKS.shape[1], -1))
        raw_RKGS = raw_RKGS.masked_fill((pos_RKS < 0)[:, :, None], 0)
        if self.normalize:
            protected = is_protected(self, pos_RKS, view.prompts_R)
            raw_RKGS = standardize(raw_RKGS, (pos_RKS >= 0) & ~protected)
        return raw_RKGS.amax(2) if self.group == "max" else raw_RKGS.mean(2)

    def raw_scores(self, view: CacheView) -> Tensor:
        """Return the mean (or largest) future logit plus the norm term (R, H, S).

        Unfilled slots vary. Purely positional heads have the bias alone.

        Raises:
            BundleError: if the layer has content heads and no statistics.
        """
        offsets_O = query_offsets(self.offset_max, view.context)
        if self.aggregation == "mean":
            raw_RHS = self._logits(view, offsets_O)
            if view.bias_LHT is not None:
                table_HT = mean_future_bias(_flat_bias(view, raw_RHS), offsets_O)
                raw_RHS = raw_RHS + _bias_at(view, table_HT)
            return raw_RHS + self._gaussian(view)
        best_RHS: Tensor | None = None
        for offset_1 in offsets_O.split(1):
            raw_RHS = self._logits(view, offset_1)
            if view.bias_LHT is not None:
                table_HT = later_bias(_flat_bias(view, raw_RHS), int(offset_1))
                raw_RHS = raw_RHS + _bias_at(view, table_HT)
            best_RHS = raw_RHS if best_RHS is None else best_RHS.maximum(raw_RHS)
        assert best_RHS is not None
        return best_RHS + self._gaussian(view)

    def _logits(self, view: CacheView, offsets_O: Tensor) -> Tensor:
        """Return the mean over some offsets, with the norm term of the moduli (R, H, S)."""
        spec = view.spec
        if not spec.content_heads:
            pos_RKS = view.slot_positions()
            return torch.zeros_like(pos_RKS, dtype=torch.float32).repeat_interleave(spec.group, 1)
        u_RHD, e_RHE = self._forms(view, offsets_O)
        tables, lengths = view.tables_RN, view.lengths_R
        return score_keys(
            view.k_pool,
            tables,
            lengths,
            u_RHD,
            e_RHE,
            bands=spec.bands,
            interleaved=spec.interleaved,
            backend=view.backend,
        )

    def _forms(self, view: CacheView, offsets_O: Tensor) -> tuple[Tensor, Tensor]:
        """Return linear forms (R, H, D) and modulus weights (R, H, E) in units of the logit."""
        spec, stats = view.spec, _stats_of(view)
        q_mean_LHF2 = stats["q_mean"]
        frequency_F = spec.inverse_frequency.to(view.k_pool.device)
        positions_Q = view.positions_R[: view.requests]
        given = (frequency_F, positions_Q, offsets_O)
        u_LQHD = query_form(q_mean_LHF2, *given, interleaved=spec.interleaved) * spec.rope_scale
        e_LHE = norm_weights(q_mean_LHF2, stats["q_abs"], self.norm_term) * spec.rope_scale
        width = spec.head_dim - 2 * spec.bands
        if width and self.score_pass_through:
            rest_LHP, absolute_LHP = (
                _known(stats, name, view) for name in ("rest_mean", "rest_abs")
            )
            rest_LQHP = rest_LHP[:, None].expand(-1, view.requests, -1, -1)
            u_LQHD = torch.cat((u_LQHD, rest_LQHP), dim=-1)
            weight_LHP = norm_weights(rest_LHP[..., None], absolute_LHP, self.norm_term)
            e_LHE = torch.cat((e_LHE, weight_LHP), dim=-1)
        elif width:
            u_LQHD, e_LHE = F.pad(u_LQHD, (0, width)), F.pad(e_LHE, (0, width))
        # Positional heads share the pool but have no content: zero rows.
        extra = (0, 0, 0, spec.heads - spec.content_heads)
        u_RHD = F.pad(spec.scale * u_LQHD, extra).flatten(0, 1)
        return u_RHD, view.rows_of(F.pad(spec.scale * e_LHE, extra))

    def _gaussian(self, view: CacheView) -> Tensor | float:
        """Return half the largest variance that the calibrated spread gives each logit."""
        spec = view.spec
        if self.norm_term != "gaussian" or not spec.content_heads:
            return 0.0
        stats, k_RKSD = _stats_of(view), view.keys()
        k_RKSD = k_RKSD.to(torch.promote_types(k_RKSD.dtype, torch.float32))
        centre_LHF = stats["q_mean"].double().square().sum(-1)
        spread_LHE = (_known(stats, "q_sq", view) - centre_LHF) * spec.rope_scale**2
        real, imag = rotary_parts(k_RKSD, spec.bands, spec.interleaved)
        square_RKSE = real.square() + imag.square()
        if spec.head_dim > 2 * spec.bands and self.score_pass_through:
            rest_LHP = _known(stats, "rest_sq", view) - _known(stats, "rest_mean", view).square()
            spread_LHE = torch.cat((spread_LHE, rest_LHP), dim=-1)
            square_RKSE = torch.cat((square_RKSE, k_RKSD[..., 2 * spec.bands :].square()), dim=-1)
        half_LHE = F.pad(spec.scale**2 / 2 * spread_LHE, (0, 0, 0, spec.heads - spec.content_heads))
        half_RKGE = view.rows_of(half_LHE).unflatten(1, (spec.kv_heads, -1)).to(k_RKSD)
        return (half_RKGE @ square_RKSE.mT).flatten(1, 2)


def _stats_of(view: CacheView) -> dict[str, Tensor]:
    if view.stats is None:
        raise BundleError(
            f"layers {list(view.layers)} have no calibration statistics; run lipllm calibrate"
        )
    return {name: value.to(view.k_pool.device) for name, value in view.stats.items()}


def _known(stats: Mapping[str, Tensor], name: str, view: CacheView) -> Tensor:
    if name not in stats:
        raise BundleError(
            f"calibration statistics of layers {list(view.layers)} lack {name}, which these"
            " settings of kv=triattention need; run lipllm calibrate"
        )
    return stats[name].double()


def _flat_bias(view: CacheView, like: Tensor) -> Tensor:
    assert view.bias_LHT is not None
    return view.bias_LHT.to(like.dtype).flatten(0, 1)


def _bias_at(view: CacheView, table: Tensor) -> Tensor:
    """Look a table (L * H, distances of the next query) up at the slots: (R, H, S)."""
    table_RHT = view.rows_of(table.unflatten(0, (len(view.layers), -1)))
    distance_RKS = view.positions_R[:, None, None] - view.slot_positions()
    index_RKS = distance_RKS.clamp(0, view.context)
    return table_RHT.gather(2, index_RKS.repeat_interleave(view.spec.group, dim=1))
