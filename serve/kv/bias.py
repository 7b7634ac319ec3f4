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
        exp_LHY = (bias_LHY - self.peak_LH[..., None]).clamp(min=-LOG_MAX).exp()
        # Powers of exp(b): the first is summed to masses, the second to sums of squares.
        self._tables = [self._prepare(exp_LHY), self._prepare(exp_LHY.square())]

    def _prepare(self, cell_LHY: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cells (0 at distance -1), sums of segments that begin at each, and of prefixes."""
        cells = F.pad(cell_LHY, (1, 0))
        room = F.pad(cell_LHY, (self.segment - 1, self.segment - 1))
        spans = room.unfold(2, self.segment, 1).sum(3)
        return cells, spans, cells.cumsum(2)

    def masses(self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters) -> BiasMass:
        """Sum over the evicted positions of each cluster.

        Args:
            layer_R: Layer of each row, an index into the table.
            positions_RT: Positions of each row's queries.
            clusters: Of these rows; which positions were kept, and since when all are.
        """
        heads, kept = self.peak_LH.shape[1], clusters.kept.shape[2]
        tokens = max(1, LARGEST // (heads * max(1, kept) * len(layer_R)))
        found = [
            self._masses(layer_R, part, clusters) for part in positions_RT.split(tokens, dim=1)
        ]
        total, error, squares = (torch.cat(x, dim=3) for x in zip(*found, strict=True))
        peak = self.peak_LH[layer_R].unflatten(1, total.shape[1:3])[..., None, None]
        is_empty = (clusters.count == 0)[:, :, None, None]
        total = total.clamp(min=0).masked_fill(is_empty, 0.0)
        lower = (total - error).clamp(min=0)
        # An empty cluster has no mass at all, whatever was rounded.
        upper = (total + error).masked_fill(is_empty, 0.0)
        squares = torch.where(lower > FAINT, squares.clamp(min=0) / lower.square(), torch.inf)
        lower = lower.masked_fill(lower <= FAINT, 0.0)
        logs = (x.log() + peak for x in (total, lower, upper))
        return BiasMass(*(x.flatten(2, 3) for x in (*logs, squares)))

    def _masses(
        self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return masses, bounds on their rounding, and upper sums of squares (R, K, G, T, C)."""
        sums = [self._sums(table, layer_R, positions_RT, clusters) for table in self._tables]
        (total, size), (squares, squares_size) = sums
        unit = (self.segment + self.context + 64) * torch.finfo(torch.float64).eps
        return total, unit * size, squares + unit * squares_size

    def _sums(
        self,
        table: tuple[Tensor, Tensor, Tensor],
        layer_R: Tensor,
        positions_RT: Tensor,
        clusters: Clusters,
    ) -> tuple[Tensor, Tensor]:
        """Return evicted sums and the sum of the sizes of what they were computed from."""
        cells, spans, prefixes = table
        kv_heads = clusters.kept.shape[1]
        ids_C = torch.arange(clusters.count.shape[2], device=layer_R.device)
        start_C = ids_C * self.segment
        t_RT1 = positions_RT[..., None]
        # A segment reaches back from its last position; what lies ahead of the query counts zero.
        begin_RTC = t_RT1 - start_C
        whole = self._look_up(spans, layer_R, begin_RTC[:, None], kv_heads)
        # Tokens since the last eviction are all kept: distances from 0, cut to the segment.
        since_RT1 = (t_RT1 - clusters.seen[:, None, None] + 1).clamp(min=0)
        ahead_RTC = (begin_RTC - self.segment + 1).clamp(min=0)
        until_RTC = since_RT1.minimum((begin_RTC + 1).clamp(min=0)).maximum(ahead_RTC)
        recent = self._look_up(prefixes, layer_R, until_RTC[:, None], kv_heads)
        recent_ahead = self._look_up(prefixes, layer_R, ahead_RTC[:, None], kv_heads)
        distance_RKTW = (positions_RT[:, None, :, None] - clusters.kept[:, :, None]).clamp(min=-1)
        distance_RKTW = distance_RKTW.masked_fill(clusters.kept[:, :, None] < 0, -1)
        cells_RKGTW = self._look_up(cells, layer_R, distance_RKTW + 1, kv_heads)
        member_RKWC = (clusters.kept[..., None] // self.segment == ids_C).double()
        kept_sum = cells_RKGTW @ member_RKWC[:, :, None]
        return whole - recent + recent_ahead - kept_sum, whole + recent + kept_sum

    def _look_up(self, table_LHY: Tensor, layer_R: Tensor, index: Tensor, kv_heads: int) -> Tensor:
        """Return the entries (R, K, G, T, ...) at an index (R, K or 1, T, ...) of each head."""
        _, heads, width = table_LHY.shape
        head_KG = torch.arange(heads, device=index.device).view(kv_heads, -1)
        first = (layer_R[:, None, None] * heads + head_KG) * width
        return table_LHY.flatten()[first[..., None, None] + index[:, :, None]]
