"""Sums of exp(relative-position bias) over evicted positions: their mass before any content."""

# Legend: L layers, R rows, K key/value heads, H query heads, G = H / K, C clusters,
# T original positions, P = positions of the map of evicted ones (a multiple of C).

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.kv.summary_store import LARGEST

LOG_MAX = 600.0  # exp of it is finite in float64
FAINT = 1e-130  # mass, relative to the largest bias, below which squares lose their digits


@dataclass(frozen=True, slots=True)
class BiasTable:
    """Exponentials of relative-position biases, laid out by original position.

    Attributes:
        windows: View (L, T, H, P), float64: entry (l, T - 1 - t, h, p) is
            exp(b_h(t - p) - peak_h), 0 for p > t.
        peak_LH: Largest bias of each head (L, H).
    """

    windows: Tensor
    peak_LH: Tensor

    @classmethod
    def of(cls, bias_LHT: Tensor, positions: int) -> "BiasTable":
        """Prepare biases (L, H, context) for maps of so many positions.

        What would underflow is rounded up.
        """
        bias_LHT = bias_LHT.double()
        peak_LH = bias_LHT.amax(2)
        exp_LHT = (bias_LHT - peak_LH[..., None]).clamp(min=-LOG_MAX).exp()
        padded = F.pad(exp_LHT.flip(2), (0, positions - 1))
        return cls(padded.unfold(2, positions, 1).transpose(1, 2), peak_LH)

    def masses(
        self, layer_R: Tensor, positions_R: Tensor, is_gone_RKP: Tensor, clusters: int
    ) -> tuple[Tensor, Tensor]:
        """Sum over the evicted positions of each cluster.

        Args:
            layer_R: Layer of each row, an index into the table.
            positions_R: Position of each row's query.
            is_gone_RKP: Evicted positions; one row serves all if there is only one.
            clusters: Clusters (C), segments of equal length of the map.

        Returns:
            ``log sum exp(b)`` (R, K, G, C), -inf for empty clusters, and ``sum w^2`` of the
            normalised weights: 1 / n where all biases agree; inf where the mass is so faint
            that the former is only an upper bound.
        """
        heads, rows = self.windows.shape[2:]
        step = max(1, LARGEST // (heads * rows))
        parts = zip(layer_R.split(step), positions_R.split(step), strict=True)
        gone = [is_gone_RKP] * -(-len(layer_R) // step)
        if len(is_gone_RKP) > 1:
            gone = list(is_gone_RKP.split(step))
        sums = [self._sums(*p, g, clusters) for p, g in zip(parts, gone, strict=True)]
        total, squares = (torch.cat(part) for part in zip(*sums, strict=True))
        peak_RKG1 = self.peak_LH[layer_R].unflatten(1, total.shape[1:3])[..., None]
        squares = torch.where(total > FAINT, squares / total.square(), torch.inf)
        return total.log() + peak_RKG1, squares

    def _sums(
        self, layer_R: Tensor, positions_R: Tensor, is_gone_RKP: Tensor, clusters: int
    ) -> tuple[Tensor, Tensor]:
        window_RHP = self.windows[layer_R, self.windows.shape[1] - 1 - positions_R]
        window_RKGP = window_RHP.unflatten(1, (is_gone_RKP.shape[1], -1))
        lost = (window_RKGP * is_gone_RKP[:, :, None]).unflatten(-1, (clusters, -1))
        return lost.sum(-1), lost.square().sum(-1)
