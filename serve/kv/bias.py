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
BLOCK = 16  # queries of a row that are looked up together
LARGEST = 1 << 20  # numbers of a temporary


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
        self._powers = [cells, cells.square()]
        room = [F.pad(x, (segment - 1, segment - 1)).unfold(2, segment, 1) for x in self._powers]
        # Sums of the first and second power: over a segment that begins at each distance from
        # 1 - segment on, and over all distances below each.
        self._spans = torch.stack([x.sum(3) for x in room], dim=3)
        self._prefixes = torch.stack([F.pad(x.cumsum(2), (1, 0)) for x in self._powers], dim=3)
        self._windows: dict[int, Tensor] = {}

    def masses(self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters) -> BiasMass:
        """Sum over the evicted positions of each cluster.

        Args:
            layer_R: Layer of each row, an index into the table.
            positions_RT: Consecutive positions of each row's queries.
            clusters: Of these rows; which positions were kept, and since when all are.
        """
        num_rows, tokens = positions_RT.shape
        block = 1 if tokens == 1 else BLOCK
        work = self.peak_LH.shape[1] * max(1, clusters.kept.shape[2]) * 2 * block
        step = max(1, LARGEST // work)
        rows = []
        for first in range(0, num_rows, step):
            part = slice(first, first + step)
            some, layers = clusters.rows(first, step), layer_R[part]
            found = [
                self._sums(layers, positions_RX, some, block)
                for positions_RX in positions_RT[part].split(block, dim=1)
            ]
            rows.append([torch.cat(x, dim=3) for x in zip(*found, strict=True)])
        sums, sizes = (torch.cat(x) for x in zip(*rows, strict=True))
        return self._bounds(layer_R, sums, sizes, clusters)

    def _bounds(self, layer_R: Tensor, sums: Tensor, sizes: Tensor, clusters: Clusters) -> BiasMass:
        """Return masses from sums of both powers, and what these were differences of."""
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
        self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters, block: int
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
        kept, kept_size = self._kept(layer_R, positions_RT, clusters, block)
        return whole - recent + ahead - kept, whole + recent + kept_size

    def _kept(
        self, layer_R: Tensor, positions_RT: Tensor, clusters: Clusters, block: int
    ) -> tuple[Tensor, Tensor]:
        """Return sums over the kept positions of each cluster, and over all (.., T, C or 1, 2)."""
        kept_RKW, tokens = clusters.kept, positions_RT.shape[1]
        windows = self._window_table(block)
        distance_RKW = (positions_RT[:, :1, None] - kept_RKW).clamp(0, self.context)
        index_RK1W = distance_RKW.masked_fill(kept_RKW < 0, self.context)[:, :, None]
        cells = _look_up(windows, layer_R, index_RK1W, kept_RKW.shape[1])[:, :, :, 0]
        # Kept positions ascend, padding first, so that a cluster is a difference of two sums.
        below = F.pad(cells.cumsum(3), (0, 0, 1, 0))
        bounds_C = torch.arange(clusters.count.shape[2] + 1, device=layer_R.device) * self.segment
        ends_RKC = torch.searchsorted(
            kept_RKW.contiguous(), bounds_C.repeat(*kept_RKW.shape[:2], 1)
        )
        ends = ends_RKC[:, :, None, :, None].expand(*below.shape[:3], -1, 2 * block)
        sums = below.gather(3, ends).unflatten(4, (2, block))[..., :tokens]
        sums_RKGTC2 = sums.permute(0, 1, 2, 5, 3, 4)
        return sums_RKGTC2.diff(dim=4), sums_RKGTC2[..., -1:, :]

    def _window_table(self, block: int) -> Tensor:
        """Return (L, H, Y + 1, 2 * block): both powers at ``block`` distances from each on.

        The last row is nothing: it stands for padding.
        """
        if block not in self._windows:
            powers = [F.pad(x, (0, block - 1)).unfold(2, block, 1) for x in self._powers]
            self._windows[block] = F.pad(torch.cat(powers, dim=3), (0, 0, 0, 1)).contiguous()
        return self._windows[block]


def _look_up(table: Tensor, layer_R: Tensor, index: Tensor, kv_heads: int) -> Tensor:
    """Return entries (R, K, G, T, X, Z) of (L, H, Y, Z) at an index (R, K or 1, T, X)."""
    _, heads, width, _ = table.shape
    head_KG = torch.arange(heads, device=index.device).view(kv_heads, -1)
    first = (layer_R[:, None, None] * heads + head_KG) * width
    flat = first[..., None, None] + index[:, :, None]
    return table.flatten(0, 2).index_select(0, flat.flatten()).unflatten(0, flat.shape)
