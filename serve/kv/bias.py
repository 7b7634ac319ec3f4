"""Sums of exp(relative-position bias) over evicted positions: their mass before any content.

Every position that a query sees is kept or evicted. So the evicted mass of a segment of positions
is that of the whole segment, looked up, less that of the kept ones in it, a few: no map of evicted
positions is needed, and work does not grow with their number.
"""

# Legend: L layers, R rows, K key/value heads, H query heads, G = H / K, C clusters, T queries of a
# row, W kept tokens (padded), Y distances.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.kv.summary import Clusters

LOG_MAX = 600.0  # exp of it is finite in float64
FAINT = 1e-130  # mass, relative to the largest bias, below which squares lose their digits
LARGEST = 1 << 22  # numbers of a temporary


@dataclass(frozen=True, slots=True)
class BiasMass:
    """Evicted mass of each cluster, (R, K, G * T, C), float64.

    Attributes:
        log_total: Logarithm of the sum of exp(b), -inf for empty clusters.
        lower: Lower bound on it; -inf where kept positions leave too little to tell.
        upper: Upper bound on it.
        squares: Upper bound on ``sum w^2``, w the normalised weights: 1 / n where all biases agree;
            inf where that cannot be told.
    """

    log_total: Tensor
    lower: Tensor
    upper: Tensor
    squares: Tensor


class BiasTable:
    """Prepared relative-position biases of layers of one shape.

    Args:
        bias_LHY: Biases by distance; what would underflow is rounded up.
        segment: Positions per cluster, cluster c begins at ``c * segment``.
    """

    def __init__(self, bias_LHY: Tensor, segment: int) -> None:
        bias_LHY = bias_LHY.double()
        self.segment, self.context = segment, bias_LHY.shape[2]
        self.peak_LH = bias_LHY.amax(2)
        cells = (bias_LHY - self.peak_LH[..., None]).clamp(min=-LOG_MAX).exp()
        # Distance -1 stands for padding: nothing.
        self._cells = F.pad(cells, (1, 0))
        powers = [cells, cells.square()]
        room = [F.pad(x, (segment - 1, segment - 1)).unfold(2, segment, 1) for x in powers]
        # Sums of the first and second power: over a segment that begins at each distance from
        # 1 - segment on, and over all distances below each.
        self._spans = torch.stack([x.sum(3) for x in room], dim=3)
        self._prefixes = torch.stack([F.pad(x.cumsum(2), (1, 0)) for x in powers], dim=3)

    def masses(self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters) -> BiasMass:
        """Sum over the evicted positions of each cluster.

        Args:
            layer_R: Layer of each row, an index into the table.
            positions_RT: Positions of each row's queries.
            clusters: Of these rows; which positions were kept, and since when all are.
        """
        heads, kept = self.peak_LH.shape[1], clusters.kept.shape[2]
        tokens = max(1, LARGEST // (2 * heads * max(1, kept) * len(layer_R)))
        found = [self._sums(layer_R, part, clusters) for part in positions_RT.split(tokens, dim=1)]
        sums, sizes = (torch.cat(x, dim=3) for x in zip(*found, strict=True))
        is_empty = (clusters.count == 0)[:, :, None, None]
        peak = self.peak_LH[layer_R].unflatten(1, sums.shape[1:3])[..., None, None]
        unit = (self.segment + self.context + 64) * torch.finfo(torch.float64).eps
        # An empty cluster has no mass at all, whatever was rounded.
        sums = sums.clamp(min=0).masked_fill(is_empty[..., None], 0.0)
        (total, squares), (error, squares_error) = sums.unbind(-1), (unit * sizes).unbind(-1)
        lower = (total - error).clamp(min=0)
        squares = torch.where(lower > FAINT, (squares + squares_error) / lower.square(), torch.inf)
        lower = lower.masked_fill(lower <= FAINT, 0.0)
        upper = (total + error).masked_fill(is_empty, 0.0)
        logs = (x.log() + peak for x in (total, lower, upper))
        return BiasMass(*(x.flatten(2, 3) for x in (*logs, squares)))

    def _sums(
        self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters
    ) -> tuple[Tensor, Tensor]:
        """Return sums of both powers over what is evicted, and of what they are differences of.

        Returns:
            Two tensors (R, K, G, T, C, 2).
        """
        num_clusters, kv_heads = clusters.count.shape[2], clusters.kept.shape[1]
        start_C = torch.arange(num_clusters, device=layer_R.device) * self.segment
        t_RT1 = positions_RT[..., None]
        # A segment reaches back from its last position; what lies ahead of the query is nothing.
        begin_RTC = t_RT1 - start_C
        whole = _look_up(self._spans, layer_R, begin_RTC.clamp(min=0)[:, None], kv_heads)
        # Tokens since the last eviction are all kept: distances from 0, cut to the segment.
        since_RT1 = (t_RT1 - clusters.seen[:, None, None] + 1).clamp(min=0)
        ahead_RTC = (begin_RTC - self.segment + 1).clamp(min=0)
        until_RTC = since_RT1.minimum((begin_RTC + 1).clamp(min=0)).maximum(ahead_RTC)
        recent = _look_up(self._prefixes, layer_R, until_RTC[:, None], kv_heads)
        ahead = _look_up(self._prefixes, layer_R, ahead_RTC[:, None], kv_heads)
        # Kept positions ascend, padding first, so that a cluster is a difference of two sums.
        distance_RKTW = (t_RT1[:, None] - clusters.kept[:, :, None]).clamp(min=-1)
        distance_RKTW = distance_RKTW.masked_fill(clusters.kept[:, :, None] < 0, -1)
        cells = _look_up(self._cells, layer_R, distance_RKTW + 1, kv_heads)
        below = F.pad(torch.stack((cells, cells.square()), dim=-1).cumsum(-2), (0, 0, 1, 0))
        bounds_C = torch.arange(num_clusters + 1, device=layer_R.device) * self.segment
        bounds_RKC = bounds_C.repeat(*clusters.kept.shape[:2], 1)
        ends_RKC = torch.searchsorted(clusters.kept.contiguous(), bounds_RKC)
        index = ends_RKC[:, :, None, None, :, None].expand(*below.shape[:4], -1, 2)
        kept = below.gather(4, index)
        evicted = whole - recent + ahead - kept.diff(dim=4)
        return evicted, whole + recent + kept[..., -1:, :]


def _look_up(table: Tensor, layer_R: Tensor, index: Tensor, kv_heads: int) -> Tensor:
    """Return entries (R, K, G, T, X, ...) of (L, H, Y, ...) at an index (R, K or 1, T, X)."""
    _, heads, width = table.shape[:3]
    head_KG = torch.arange(heads, device=index.device).view(kv_heads, -1)
    first = (layer_R[:, None, None] * heads + head_KG) * width
    return table.flatten(0, 2)[first[..., None, None] + index[:, :, None]]
