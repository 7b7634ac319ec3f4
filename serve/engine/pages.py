"""Decode attention over pages where they lie: nothing of the cache is copied.

On the CPU decoding is bound by reading keys and values. The pages of all rows are taken in the
order in which they lie in the pool, whole ranges at once; only logits and weights, a small share of
the data, are brought from the order of pages to that of rows and back.
"""

# Legend: R rows, W table width (blocks), P pages that are read, K key/value heads, H query heads,
# G = H / K, B slots of a block, S slots of a row (W * B), D head width, T relative distances.

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.pools import LayerPool

BRIDGE = 4  # foreign pages that are read along rather than start another range


Product = Callable[[Tensor, Tensor], Tensor]


class PagePlan:
    """The pages of some rows, in the order of the pool, and the way to rows and back.

    It is good for as long as the tables do not change.

    Args:
        tables: Block table of each row; no block occurs twice.
        ranges: Blocks to read, in order; foreign ones among them are ignored.
        device: Where the pools are.
    """

    def __init__(self, tables: Rows[Rows[int]], ranges: Rows[range], device: torch.device) -> None:
        self.rows, self.ranges, self.width = len(tables), ranges, max(map(len, tables))
        place = {block: page for page, block in enumerate(b for part in ranges for b in part)}
        row_P, entry_P = [0] * len(place), [0] * len(place)
        entries, owned, starts = list[int](), list[int](), list[int]()
        for row, table in enumerate(tables):
            pages = [place[block] for block in table]
            starts.append(len(owned))
            owned += pages
            entries += pages + [0] * (self.width - len(pages))
            for index, page in enumerate(pages):
                row_P[page], entry_P[page] = row, index
        lists = (row_P, entry_P, entries, owned, starts)
        tensors = [torch.tensor(x, dtype=torch.int64, device=device) for x in lists]
        # Row and place in its table of each page; 0 for foreign ones. Page of each table entry; 0
        # for padding, which is left out of ``owned``.
        self.row_P, self.entry_P, self.page_RW, self.owned, self.starts_R = tensors
        self._contents: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._lines: dict[int, tuple[Tensor, Tensor]] = {}

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
        is_out_R1S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Attend from one query per row to its filled slots.

        Args:
            layer: Index of the layer.
            q_RHD: Queries after RoPE.
            pool: Its cache, in the queries' dtype; unfilled slots hold finite values.
            spec: The layer.
            positions_R: Original position of each query.
            is_out_R1S: Which slots are not filled; at least one of each row is.

        Returns:
            Outputs (R, H, D), logits (R, H, S); minus infinity in slots that are not seen.
        """
        rows, heads, width = q_RHD.shape
        kv_heads, size = pool.keys.shape[1:3]
        to_rows, to_pages = self._lines_of(heads)
        keys, values = self._contents_of(layer, pool)
        q_PGD = q_RHD.index_select(0, self.row_P).view(-1, heads // kv_heads, width)
        # Nothing is added: beta is 0.
        zero, scale = q_RHD.new_empty(1, 1, 1), spec.scale
        z_PGB = self._each(q_PGD, keys, lambda q, k: zero.baddbmm(q, k, beta=0, alpha=scale))
        z_RHS = z_PGB.view(-1, size).index_select(0, to_rows).view(rows, heads, -1)
        if spec.bias_HT is not None or spec.sliding_window is not None:
            self._shift(z_RHS, pool.positions, spec, positions_R, is_out_R1S)
        z_RHS.masked_fill_(is_out_R1S, -torch.inf)
        weights_PGB = z_RHS.softmax(-1).view(-1, size).index_select(0, to_pages)
        o_PGD = self._each(weights_PGB.view_as(z_PGB), values, torch.bmm)
        return self._total(o_PGD.view(-1, heads * width)).view(rows, heads, width), z_RHS

    def _contents_of(self, layer: int, pool: LayerPool) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys (.., D, B) and values (.., B, D) of each range, pages and heads in one."""
        if layer not in self._contents:
            keys, values = (
                [x[part.start : part.stop].flatten(0, 1) for part in self.ranges]
                for x in (pool.keys, pool.values)
            )
            self._contents[layer] = [x.mT for x in keys], values
        return self._contents[layer]

    def _each(self, x: Tensor, contents: Rows[Tensor], product: Product) -> Tensor:
        """Return the products of pages with what they hold, range after range."""
        if len(contents) == 1:
            return product(x, contents[0])
        parts = zip(x.split([len(content) for content in contents]), contents, strict=True)
        return torch.cat([product(part, content) for part, content in parts])

    def _lines_of(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return, with B slots to a line, the line of (P, H) at each of (R, H, W), and back."""
        if heads not in self._lines:
            head_H1 = torch.arange(heads, device=self.row_P.device)[:, None]
            to_rows = self.page_RW.view(self.rows, 1, -1) * heads + head_H1
            to_pages = (self.row_P * heads + head_H1) * self.width + self.entry_P
            self._lines[heads] = to_rows.flatten(), to_pages.T.flatten()
        return self._lines[heads]

    def _shift(
        self,
        z_RHS: Tensor,
        pos_pool: Tensor,
        spec: LayerSpec,
        positions_R: Tensor,
        is_out_R1S: Tensor,
    ) -> None:
        """Add the relative-position bias to logits, and hide what is outside the window."""
        rows, kv_heads = len(z_RHS), spec.kv_heads
        pos_PKB = torch.cat([pos_pool[part.start : part.stop] for part in self.ranges])
        to_rows, _ = self._lines_of(kv_heads)
        pos_RKS = pos_PKB.flatten(0, 1).index_select(0, to_rows).view(rows, kv_heads, -1)
        distance_RKS = positions_R[:, None, None] - pos_RKS
        distance_RHS = distance_RKS.repeat_interleave(spec.group, dim=1)
        if spec.bias_HT is not None:
            # What stands in unfilled slots may be no position at all.
            index_RHS = distance_RHS.masked_fill(is_out_R1S, 0)
            table_RHT = spec.bias_HT.to(z_RHS.dtype).expand(rows, -1, -1)
            z_RHS += table_RHT.gather(2, index_RHS)
        if spec.sliding_window is not None:
            z_RHS.masked_fill_(distance_RHS >= spec.sliding_window, -torch.inf)

    def _total(self, o_PO: Tensor) -> Tensor:
        """Return the sum over each row's pages, in the order of its table."""
        if self.rows == 1:
            return o_PO.index_select(0, self.owned).sum(0)
        return torch.embedding_bag(o_PO, self.owned, self.starts_R, mode=0)[0]


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
