"""Decode attention over pages where they lie: nothing of the cache is copied.

On the CPU decoding is bound by reading keys and values. The pages of all rows are taken in the
order in which they lie in the pool, whole ranges at once; only logits and weights, a small share of
the data, are brought from the order of pages to that of rows and back.
"""

# Legend: R rows, W table width (blocks), P pages that are read, K key/value heads, H query heads,
# G = H / K, B slots of a block, S slots of a row (W * B), D head width, T relative distances.

from collections.abc import Sequence as Rows

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.pools import LayerPool

BRIDGE = 4  # foreign pages that are read along rather than start another range


# Which pages * K it covers, its keys (.., D, B) and its values (.., B, D).
Segment = tuple[slice, Tensor, Tensor]


class PagePlan:
    """The pages of some rows, in the order of the pool, and the way to rows and back.

    It is good for as long as the tables do not change.

    Args:
        tables: Block table of each row; no block occurs twice.
        ranges: Blocks to read, in order; foreign ones among them are ignored.
        device: Where the pools are.
    """

    def __init__(self, tables: Rows[Rows[int]], ranges: Rows[range], device: torch.device) -> None:
        self.rows, self.ranges = len(tables), ranges
        place = {block: page for page, block in enumerate(b for part in ranges for b in part)}
        width = max(map(len, tables))
        row_P, entry_P = [0] * len(place), [0] * len(place)
        entries, owned, starts = list[int](), list[int](), list[int]()
        for row, table in enumerate(tables):
            pages = [place[block] for block in table]
            starts.append(len(owned))
            owned += pages
            entries += pages + [0] * (width - len(pages))
            for index, page in enumerate(pages):
                row_P[page], entry_P[page] = row, row * width + index
        # Most often a single row whose pages lie in its own order: nothing to bring anywhere.
        self.is_ordered = self.rows == 1 and entries == list(range(len(place)))
        self.pages = len(place)
        lists = (row_P, entries, entry_P, owned, starts)
        tensors = [torch.tensor(x, dtype=torch.int64, device=device) for x in lists]
        # Of each page its row and its table entry; of each table entry its page; padding is 0.
        self.row_P, self.page_M, self.entry_P, self.owned, self.starts_R = tensors
        self._segments: dict[int, list[Segment]] = {}

    @classmethod
    def of(cls, tables: Rows[Rows[int]], device: torch.device) -> "PagePlan | None":
        """Return the plan; None where rows share pages."""
        ranges = _ranges(sorted(block for table in tables for block in table))
        return None if ranges is None else cls(tables, ranges, device)

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        pool: LayerPool,
        spec: LayerSpec,
        positions_R: Tensor,
        is_out_RS: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend from one query per row to its filled slots.

        Args:
            layer: Index of the layer.
            q_RHD: Queries after RoPE.
            pool: Its cache, in the queries' dtype; unfilled slots hold finite values.
            spec: The layer.
            positions_R: Original position of each query.
            is_out_RS: Which slots are not filled; at least one of each row is.

        Returns:
            Outputs (R, H, D), logits (R, K, G, S); minus infinity in slots that are not seen.
        """
        heads, width = q_RHD.shape[1:]
        kv_heads, size = pool.keys.shape[1:3]
        group, all_heads = heads // kv_heads, self.pages * kv_heads
        segments = self._segments_of(layer, pool)
        q_PGD = q_RHD.index_select(0, self.row_P).view(all_heads, group, width)
        z_PGB = q_RHD.new_empty(all_heads, group, size)
        for part, keys, _ in segments:
            # The first argument does not count: beta is 0.
            torch.baddbmm(z_PGB[part], q_PGD[part], keys, beta=0, alpha=spec.scale, out=z_PGB[part])
        z_RKGS = self._by_row(z_PGB.view(self.pages, kv_heads, group, size))
        if spec.bias_HT is not None or spec.sliding_window is not None:
            distance_RKS = self._distances(pool.positions, positions_R, is_out_RS)
            z_RKGS = _shifted(z_RKGS, distance_RKS, spec)
        z_RKGS.masked_fill_(is_out_RS[:, None, None], -torch.inf)
        weights_PGB = self._by_page(z_RKGS.softmax(-1), size).view(all_heads, group, size)
        o_PGD = torch.empty_like(q_PGD)
        for part, _, values in segments:
            torch.bmm(weights_PGB[part], values, out=o_PGD[part])
        return self._total(o_PGD.view(self.pages, heads * width)).view(q_RHD.shape), z_RKGS

    def _segments_of(self, layer: int, pool: LayerPool) -> list[Segment]:
        if layer not in self._segments:
            found, start, kv_heads = list[Segment](), 0, pool.keys.shape[1]
            for part in self.ranges:
                end = start + len(part) * kv_heads
                keys, values = (
                    x[part.start : part.stop].flatten(0, 1) for x in (pool.keys, pool.values)
                )
                found.append((slice(start, end), keys.mT, values))
                start = end
            self._segments[layer] = found
        return self._segments[layer]

    def _by_row(self, z_PKGB: Tensor) -> Tensor:
        """Return (R, K, G, S) of what there is per page."""
        if not self.is_ordered:
            z_PKGB = z_PKGB.index_select(0, self.page_M)
        z_RWKGB = z_PKGB.unflatten(0, (self.rows, -1))
        return z_RWKGB.permute(0, 2, 3, 1, 4).flatten(3)

    def _by_page(self, x_RKGS: Tensor, size: int) -> Tensor:
        x_RWKGB = x_RKGS.unflatten(3, (-1, size)).permute(0, 3, 1, 2, 4)
        if self.is_ordered:
            return x_RWKGB.contiguous()
        return x_RWKGB.flatten(0, 1).index_select(0, self.entry_P)

    def _total(self, o_PO: Tensor) -> Tensor:
        """Return the sum over each row's pages, in the order of its table."""
        if self.rows > 1:
            return F.embedding_bag(self.owned, o_PO, self.starts_R, mode="sum")
        return (o_PO if self.is_ordered else o_PO.index_select(0, self.owned)).sum(0)

    def _distances(self, pos_pool: Tensor, positions_R: Tensor, is_out_RS: Tensor) -> Tensor:
        """Return how far each slot lies before its row's query (R, K, S); 0 if unfilled."""
        pos_PKB = torch.cat([pos_pool[part.start : part.stop] for part in self.ranges])
        pos_RKS = self._by_row(pos_PKB[:, :, None])[:, :, 0]
        distance_RKS = positions_R[:, None, None] - pos_RKS
        return distance_RKS.masked_fill(is_out_RS[:, None], 0)


def _ranges(blocks: list[int]) -> list[range] | None:
    """Return the ranges that hold the sorted blocks; None if a block occurs twice."""
    ranges: list[range] = []
    for block in blocks:
        end = ranges[-1].stop if ranges else -BRIDGE - 1
        if block < end:
            return None
        if block - end <= BRIDGE:
            ranges[-1] = range(ranges[-1].start, block + 1)
        else:
            ranges.append(range(block, block + 1))
    return ranges


def _shifted(z_RKGS: Tensor, distance_RKS: Tensor, spec: LayerSpec) -> Tensor:
    """Add the relative-position bias; hide what is outside the window."""
    if spec.bias_HT is not None:
        heads_KG1 = torch.arange(spec.heads, device=z_RKGS.device).view(spec.kv_heads, -1, 1)
        z_RKGS += spec.bias_HT.to(z_RKGS.dtype)[heads_KG1, distance_RKS[:, :, None]]
    if spec.sliding_window is not None:
        z_RKGS.masked_fill_((distance_RKS >= spec.sliding_window)[:, :, None], -torch.inf)
    return z_RKGS
