"""Summaries of all running sequences, for layers of one shape."""

# Legend: L layers, R rows of a call, Q sequences, K key/value heads, C clusters, S slots, E evicted
# slots (padded), W kept tokens (padded), D head width, N table width (blocks).

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.kv.summary import Clusters, Summary, segment_exponent
from serve.kv.view import CacheView

LARGEST = 1 << 22  # numbers of a temporary


class SummaryStore:
    """One row of each layer per sequence: sums in float64, what steps need in working precision.

    Row 0 is always empty: it stands for sequences that lost nothing.

    Args:
        layers: How many layers (L).
        spec: Their shapes.
        clusters: Clusters per key/value head (C).
        device: Where it lives.
        dtype: Working precision, float32 or float64.
        context: Longest sequence, for layers with biases: their segments are fixed, and the
            positions that survive are remembered. None for other layers.
    """

    def __init__(
        self,
        layers: int,
        spec: LayerSpec,
        clusters: int,
        device: torch.device,
        dtype: torch.dtype,
        context: int | None = None,
    ) -> None:
        self.layers, self.device, self.dtype, self.rows = layers, device, dtype, 1
        self._shape, self._width = (spec.kv_heads, clusters), spec.head_dim
        self._exponent = None if context is None else segment_exponent(context, clusters)
        self._sums, self._work = self._empty(1)
        self._kept = torch.zeros(layers, spec.kv_heads, 0, dtype=torch.int64, device=device)
        self._free: list[int] = []

    @property
    def segment(self) -> int:
        """Positions per cluster where that is fixed."""
        return 1 << (self._exponent or 0)

    @torch.inference_mode()
    def open(self) -> int:
        """Return a row with nothing evicted."""
        if not self._free:
            sums, work = self._empty(self.rows)
            self._sums = [self._append(*pair) for pair in zip(self._sums, sums, strict=True)]
            self._work = [self._append(*pair) for pair in zip(self._work, work, strict=True)]
            self._kept = self._append(self._kept, torch.full_like(self._kept, -1))
            self._free = list(range(2 * self.rows - 1, self.rows - 1, -1))
            self.rows *= 2
        row = self._free.pop()
        first_L = torch.arange(0, self.layers * self.rows, self.rows, device=self.device)
        for table in (*self._sums, *self._work):
            table[first_L + row] = table[0].clone()
        self._kept[first_L + row] = -1
        return row

    def close(self, row: int) -> None:
        """Give a row back; it may be given to another sequence."""
        self._free.append(row)

    def take(self, rows_Q: Tensor) -> Clusters:
        """Return what steps need of some rows of all layers, layer-major: tensors (L * Q, ...)."""
        index_R = self._flat(rows_Q)
        tables = (*self._work, self._kept, self._sums[-1])
        centre, small, kept, seen = (table.index_select(0, index_R) for table in tables)
        count, log_count, *sizes = small.unbind(-1)
        return Clusters(count, log_count, *centre.unbind(3), *sizes, kept, seen)

    @torch.inference_mode()
    def evict(self, view: CacheView, rows: Sequence[int], keep_RKS: Tensor) -> None:
        """Add what a compaction of these layers is about to drop; call it before ``compact_kv``.

        Args:
            view: The cache before the compaction; its layers are those of the store.
            rows: Row of each sequence of the view, distinct.
            keep_RKS: Slots that survive, from ``choose``.
        """
        index_R = self._flat(torch.tensor(rows, dtype=torch.int64, device=self.device))
        if self._exponent is not None:
            self._remember(view, index_R, keep_RKS)
        block_size, width = view.k_pool.shape[2:]
        most = view.tables_RN.shape[1] * block_size - keep_RKS.shape[2]
        step = max(1, LARGEST // max(1, keep_RKS.shape[1] * most * width))
        for first in range(0, len(index_R) if most > 0 else 0, step):
            part = slice(first, first + step)
            summary = Summary(*(table.index_select(0, index_R[part]) for table in self._sums))
            summary.add(*_evicted(view, keep_RKS[part], part, most))
            for tables, new in ((self._sums, summary.fields()), (self._work, self._cast(summary))):
                for table, value in zip(tables, new, strict=True):
                    table.index_copy_(0, index_R[part], value)

    def _remember(self, view: CacheView, index_R: Tensor, keep_RKS: Tensor) -> None:
        """Note which positions survive."""
        missing = keep_RKS.shape[2] - self._kept.shape[2]
        if missing > 0:
            self._kept = F.pad(self._kept, (0, missing), value=-1)
        kept_RKS = view.slot_positions().gather(2, keep_RKS)
        kept_RKS = F.pad(kept_RKS, (0, max(0, -missing)), value=-1)
        self._kept[index_R] = kept_RKS.sort(dim=-1).values

    def _cast(self, summary: Summary) -> list[Tensor]:
        """Return two tables of ``take``: centres, and numbers of each cluster."""
        now = summary.clusters(self.dtype)
        sizes = (now.key_norm, now.key_radius, now.value_norm, now.value_radius)
        small = torch.stack((now.count, now.log_count, *sizes), dim=-1)
        return [torch.stack((now.keys, now.values), dim=3), small]

    def _flat(self, rows_Q: Tensor) -> Tensor:
        layer_L1 = torch.arange(self.layers, device=self.device)[:, None]
        return (layer_L1 * self.rows + rows_Q).flatten()

    def _append(self, old: Tensor, new: Tensor) -> Tensor:
        parts = (x.unflatten(0, (self.layers, self.rows)) for x in (old, new))
        return torch.cat(tuple(parts), dim=1).flatten(0, 1)

    def _empty(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        shape = (self.layers * rows, *self._shape)
        empty = Summary.empty(shape, self._width, self.device, self._exponent or 0)
        return list(empty.fields()), self._cast(empty)


def _evicted(view: CacheView, keep_RKS: Tensor, part: slice, most: int) -> tuple[Tensor, ...]:
    """Return the arguments of ``Summary.add`` for some rows, of which ``most`` slots go at most."""
    tables_RN, block_size = view.tables_RN[part], view.k_pool.shape[2]
    heads, slots = keep_RKS.shape[1], tables_RN.shape[1] * block_size
    is_filled = torch.arange(slots, device=tables_RN.device) < view.lengths_R[part, None]
    is_gone_RKS = is_filled[:, None].repeat(1, heads, 1).scatter_(2, keep_RKS, False)
    order_RKS = is_gone_RKS.byte().argsort(dim=-1, descending=True, stable=True)
    is_gone_RKE = is_gone_RKS.gather(2, order_RKS[..., :most])
    # Padding reads the first slot, which is filled: zero times a stale NaN would not be zero.
    slot_RKE = order_RKS[..., :most] * is_gone_RKE
    pages_RKN = tables_RN.long()[:, None].expand(-1, heads, -1)
    block_RKE = pages_RKN.gather(2, slot_RKE // block_size)
    head_K1 = torch.arange(heads, device=tables_RN.device)[:, None]
    flat = ((block_RKE * heads + head_K1) * block_size + slot_RKE % block_size).flatten()
    k_RKED, v_RKED, positions_RKE = (
        pool.view(-1, *pool.shape[3:]).index_select(0, flat).unflatten(0, slot_RKE.shape)
        for pool in (view.k_pool, view.v_pool, view.pos_pool)
    )
    x_RKE2D = torch.stack((k_RKED, v_RKED), dim=3)
    return x_RKE2D, positions_RKE.long(), is_gone_RKE, view.positions_R[part]
