"""What is remembered of evicted keys and values: means, and radii around them, by position.

Positions are cut into segments; all evicted tokens of a segment form a cluster. Segments double
when a sequence outgrows them, so that a few clusters serve any length.
"""

# Legend: L layers, R rows of a call, Q sequences, K key/value heads, C clusters, S slots, E evicted
# slots (padded), D head width, T original positions, N table width (blocks).

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.kv.view import CacheView

OUTWARD = 1e-11  # relative; covers a few thousand float64 roundings
LARGEST = 1 << 22  # float64 numbers of a temporary
DOUBLINGS = 48  # of segments; more than positions can need


@dataclass(slots=True)
class Summary:
    """Evicted keys and values of some rows; float64.

    Attributes:
        count: Evicted tokens (R, K, C).
        key_centre: Mean evicted key (R, K, C, D).
        key_radius: Largest distance of an evicted key from the centre (R, K, C).
        value_centre: Mean evicted value (R, K, C, D).
        value_radius: Largest distance of an evicted value from its centre (R, K, C).
        exponent: Segments have ``2 ** exponent`` positions (R,), int64.
        is_gone: Evicted positions (R, K, T), bool; T is 0 where nobody asks for them.
    """

    count: Tensor
    key_centre: Tensor
    key_radius: Tensor
    value_centre: Tensor
    value_radius: Tensor
    exponent: Tensor
    is_gone: Tensor

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        width: int,
        device: torch.device,
        positions: int | None = None,
    ) -> "Summary":
        """Return the summary of no evictions.

        Args:
            shape: (R, K, C).
            width: Head width.
            device: Where it lives.
            positions: Length of the map of evicted positions; the segments then have the fixed
                length that covers it. None keeps no map, and lets segments grow.
        """
        zeros = torch.zeros(*shape, dtype=torch.float64, device=device)
        centre = torch.zeros(*shape, width, dtype=torch.float64, device=device)
        exponent = segment_exponent(positions or 1, shape[2])
        return cls(
            zeros,
            centre,
            zeros.clone(),
            centre.clone(),
            zeros.clone(),
            torch.full(shape[:1], exponent, dtype=torch.int64, device=device),
            torch.zeros(*shape[:2], positions or 0, dtype=torch.bool, device=device),
        )

    def fields(self) -> tuple[Tensor, ...]:
        """Return the tensors in declaration order."""
        return (
            self.count,
            self.key_centre,
            self.key_radius,
            self.value_centre,
            self.value_radius,
            self.exponent,
            self.is_gone,
        )

    def add(
        self,
        k_RKED: Tensor,
        v_RKED: Tensor,
        positions_RKE: Tensor,
        is_gone_RKE: Tensor,
        seen_R: Tensor,
    ) -> None:
        """Add evicted slots.

        Args:
            k_RKED: Keys after RoPE.
            v_RKED: Values.
            positions_RKE: Original positions; any value where nothing is evicted.
            is_gone_RKE: Which slots are evicted now.
            seen_R: A number above every position so far.
        """
        clusters, old_count = self.count.shape[2], self.count
        into_RKC = self._widen(seen_R)[:, None].expand_as(old_count)
        where_RKE = positions_RKE.clamp(min=0)
        cluster_RKE = (where_RKE >> self.exponent[:, None, None]).clamp(max=clusters - 1)
        member_RKEC = F.one_hot(cluster_RKE, clusters).double() * is_gone_RKE[..., None]
        moved_in = torch.zeros_like(old_count).scatter_add(2, into_RKC, old_count)
        self.count = moved_in + member_RKEC.sum(2)
        keys = (k_RKED.double(), self.key_centre, self.key_radius)
        values = (v_RKED.double(), self.value_centre, self.value_radius)
        for x_RKED, centre, radius in (keys, values):
            target = into_RKC[..., None].expand_as(centre)
            total = member_RKEC.mT @ x_RKED
            total = total.scatter_add(2, target, old_count[..., None] * centre)
            moved = total / self.count.clamp(min=1)[..., None]
            # An old ball, seen from the new centre, grows by the shift.
            shift = (moved.gather(2, target) - centre).norm(dim=-1)
            grown = torch.where(old_count > 0, radius + shift, 0)
            index = cluster_RKE[..., None].expand_as(x_RKED)
            far_RKE = (x_RKED - moved.gather(2, index)).norm(dim=-1) * is_gone_RKE
            reached = torch.zeros_like(radius).scatter_reduce(2, into_RKC, grown, "amax")
            reached = reached.scatter_reduce(2, cluster_RKE, far_RKE, "amax")
            centre.copy_(moved)
            radius.copy_(reached * (1 + OUTWARD))
        if self.is_gone.shape[2]:
            index = where_RKE.clamp(max=self.is_gone.shape[2] - 1)
            self.is_gone = self.is_gone.scatter_reduce(2, index, is_gone_RKE, "amax")

    def _widen(self, seen_R: Tensor) -> Tensor:
        """Double segments until they cover ``seen_R``; return each old cluster's new one (R, C)."""
        clusters, device = self.count.shape[2], self.count.device
        reach = clusters << torch.arange(DOUBLINGS, device=device)
        needed_R = (reach < seen_R[:, None]).sum(1).maximum(self.exponent)
        shift_R, self.exponent = needed_R - self.exponent, needed_R
        return torch.arange(clusters, device=device) >> shift_R[:, None]


def segment_exponent(positions: int, clusters: int) -> int:
    """Return the smallest e such that ``clusters`` segments of ``2 ** e`` cover the positions."""
    return max(0, (-(-positions // clusters) - 1).bit_length())


def map_length(context: int, clusters: int) -> int:
    """Return the length of a map of evicted positions that all segments together have."""
    return clusters << segment_exponent(context, clusters)


class SummaryStore:
    """Summaries of running sequences for layers of one shape.

    Row 0 is always empty: it stands for sequences that lost nothing.

    Args:
        layers: How many layers.
        spec: Their shapes.
        clusters: Clusters per key/value head (C).
        device: Where it lives.
        positions: Length of the map of evicted positions, None for none.
    """

    def __init__(
        self,
        layers: int,
        spec: LayerSpec,
        clusters: int,
        device: torch.device,
        positions: int | None = None,
    ) -> None:
        self.layers, self.device = layers, device
        self._shape, self._width = (spec.kv_heads, clusters), spec.head_dim
        self._positions = positions
        self._tables = self._empty(1)
        self._free: list[int] = []

    @property
    def rows(self) -> int:
        """Rows, free ones and the empty one included."""
        return self._tables[0].shape[1]

    @torch.inference_mode()
    def open(self) -> int:
        """Return a row with nothing evicted."""
        if not self._free:
            rows = self.rows
            pairs = zip(self._tables, self._empty(rows), strict=True)
            self._tables = [torch.cat(pair, dim=1) for pair in pairs]
            self._free = list(range(2 * rows - 1, rows - 1, -1))
        row = self._free.pop()
        for table in self._tables:
            table[:, row] = table[:, 0]
        return row

    def close(self, row: int) -> None:
        """Give a row back; it may be given to another sequence."""
        self._free.append(row)

    def whole(self) -> Summary:
        """Return all rows, fields (L, rows, ...); a view."""
        return Summary(*self._tables)

    def take(self, rows_Q: Tensor) -> Summary:
        """Return a copy of some rows of all layers, layer-major: fields (L * Q, ...)."""
        index_R = self._flat(rows_Q)
        return Summary(*(table.flatten(0, 1)[index_R] for table in self._tables))

    @torch.inference_mode()
    def evict(self, view: CacheView, rows: Sequence[int], keep_RKS: Tensor) -> None:
        """Add what a compaction of these layers is about to drop; call it before ``compact_kv``.

        Args:
            view: The cache before the compaction; its layers are those of the store.
            rows: Row of each sequence of the view, distinct.
            keep_RKS: Slots that survive, from ``choose``.
        """
        index_R = self._flat(torch.tensor(rows, dtype=torch.int64, device=self.device))
        block_size, width = view.k_pool.shape[2:]
        most = view.tables_RN.shape[1] * block_size - keep_RKS.shape[2]
        step = max(1, LARGEST // max(1, keep_RKS.shape[1] * most * width))
        for first in range(0, len(index_R) if most > 0 else 0, step):
            part = slice(first, first + step)
            summary = Summary(*(table.flatten(0, 1)[index_R[part]] for table in self._tables))
            summary.add(*_evicted(view, keep_RKS[part], part, most))
            for table, new in zip(self._tables, summary.fields(), strict=True):
                table.flatten(0, 1)[index_R[part]] = new

    def _flat(self, rows_Q: Tensor) -> Tensor:
        layer_L1 = torch.arange(self.layers, device=self.device)[:, None]
        return (layer_L1 * self.rows + rows_Q).flatten()

    def _empty(self, rows: int) -> list[Tensor]:
        shape = (self.layers * rows, *self._shape)
        empty = Summary.empty(shape, self._width, self.device, self._positions)
        return [field.unflatten(0, (self.layers, rows)) for field in empty.fields()]


def _evicted(view: CacheView, keep_RKS: Tensor, part: slice, most: int) -> tuple[Tensor, ...]:
    """Return the arguments of ``Summary.add`` for some rows, of which ``most`` slots go at most."""
    tables_RN, block_size = view.tables_RN[part], view.k_pool.shape[2]
    heads, slots = keep_RKS.shape[1], tables_RN.shape[1] * block_size
    is_filled = torch.arange(slots, device=tables_RN.device) < view.lengths_R[part, None]
    is_gone_RKS = is_filled[:, None].repeat(1, heads, 1).scatter_(2, keep_RKS, False)
    order_RKS = is_gone_RKS.byte().argsort(dim=-1, descending=True, stable=True)
    slot_RKE = order_RKS[..., :most]
    is_gone_RKE = is_gone_RKS.gather(2, slot_RKE)
    pages_RKN = tables_RN.long()[:, None].expand(-1, heads, -1)
    block_RKE = pages_RKN.gather(2, slot_RKE // block_size)
    head_K1 = torch.arange(heads, device=tables_RN.device)[:, None]
    where = (block_RKE, head_K1, slot_RKE % block_size)
    # Stale slots may hold anything; zero times NaN would not be zero.
    k_RKED, v_RKED = (
        pool[where].masked_fill(~is_gone_RKE[..., None], 0) for pool in (view.k_pool, view.v_pool)
    )
    positions_RKE = view.pos_pool[where].long()
    return k_RKED, v_RKED, positions_RKE, is_gone_RKE, view.positions_R[part]
