"""Decode attention over pages where they lie: nothing of the cache is copied.

On the CPU decoding is bound by reading keys and values. The pages of all rows are taken in the
order in which they lie in the pool, whole ranges at once, and a page that several rows share is
read once for all of them; only logits and weights, a small share of the data, are brought from the
order of pages to that of rows and back.
"""

# Legend: R rows, W table width (blocks), V visits: pairs of a page and one of its rows, K key/value
# heads, H query heads, G = H / K, B slots of a block, S slots of a row (W * B), L lines: pairs of a
# visit and a query head, in the order of the products, D head width, T relative distances.

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.pools import LayerPool
from serve.kernels import gather_pages

NOWHERE = -1
BRIDGE = 4  # foreign pages that are read along rather than start another range

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Range:
    """Blocks that are read together, each by the same number of rows."""

    blocks: range
    readers: int


@dataclass(frozen=True, slots=True)
class Lines:
    """The way between lines and rows, for a number of heads.

    Attributes:
        queries: Number of queries, R * H.
        query_L: Query of each line.
        place_L: Page of a query, out of (R * H * W), that each line is about.
        line_RHW: Line of each page of each query, flat; line 0 for padding.
        owned: The same without padding.
        starts: Where each query starts in ``owned``.
    """

    queries: int
    query_L: Tensor
    place_L: Tensor
    line_RHW: Tensor
    owned: Tensor
    starts: Tensor


class PagePlan:
    """The pages of some rows in the order of the pool, for as long as no table changes.

    Args:
        tables: Block table of each row.
        padded_RW: The same as a matrix, where the pools are; padded with any block.
    """

    def __init__(self, tables: Rows[Rows[int]], padded_RW: Tensor) -> None:
        (self.rows, self.width), device = padded_RW.shape, padded_RW.device
        readers: dict[int, list[int]] = {}
        for row, table in enumerate(tables):
            for place, block in enumerate(table, row * self.width):
                readers.setdefault(block, []).append(place)
        self.ranges = list(_ranges(sorted((block, len(found)) for block, found in readers.items())))
        self.is_shared = any(part.readers > 1 for part in self.ranges)
        places = list[int]()
        for part in self.ranges:
            foreign = [NOWHERE] * part.readers
            for block in part.blocks:
                places += readers.get(block, foreign)
        self._block_RW = padded_RW
        self._lengths_R = torch.tensor(list(map(len, tables)), device=device)
        self._place_V = torch.tensor(places, dtype=torch.int64, device=device)
        self._lines: dict[tuple[int, int], Lines] = {}
        self._contents: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

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
        size, scale = pool.keys.shape[2], spec.scale
        lines = self._lines_of(heads, spec.group)
        # Where every page has one reader, the heads of a query stay together.
        whole = lines if self.is_shared else self._lines_of(1, 1)
        keys, values = self._contents_of(layer, pool)
        # Nothing is added: beta is 0.
        zero = q_RHD.new_empty(1, 1, 1)
        q_LD = q_RHD.reshape(whole.queries, -1).index_select(0, whole.query_L).view(-1, width)
        z_LB = self._each(q_LD, keys, lambda q, k: zero.baddbmm(q, k, beta=0, alpha=scale))
        z_RHS = z_LB.index_select(0, lines.line_RHW).view(rows, heads, -1)
        if spec.bias_HT is not None or spec.sliding_window is not None:
            self._shift(z_RHS, pool.positions, spec, positions_R, is_out_R1S)
        z_RHS.masked_fill_(is_out_R1S, -torch.inf)
        weights_LB = z_RHS.softmax(-1).view(-1, size).index_select(0, lines.place_L)
        o_LD = self._each(weights_LB, values, torch.bmm).view(len(whole.query_L), -1)
        # In the order of each row's table, wherever its pages lie: bit for bit the same.
        o_RHD = torch.embedding_bag(o_LD, whole.owned, whole.starts, mode=0)[0]
        return o_RHD.view(rows, heads, width), z_RHS

    def _each(self, x_LI: Tensor, contents: Rows[Tensor], product: Product) -> Tensor:
        """Return the products of lines with what their pages hold, range after range."""
        width, heads = x_LI.shape[1], len(x_LI) // len(self._place_V)
        sizes = [len(part.blocks) * part.readers * heads for part in self.ranges]
        parts = x_LI.split(sizes) if len(sizes) > 1 else [x_LI]
        products = [
            product(x.view(len(held), -1, width), held).flatten(0, 1)
            for x, held in zip(parts, contents, strict=True)
        ]
        return torch.cat(products) if len(products) > 1 else products[0]

    def _contents_of(self, layer: int, pool: LayerPool) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys (.., D, B) and values (.., B, D) of each range, pages and heads in one."""
        if layer not in self._contents:
            spans = [slice(part.blocks.start, part.blocks.stop) for part in self.ranges]
            keys, values = (
                [x[span].flatten(0, 1) for span in spans] for x in (pool.keys, pool.values)
            )
            self._contents[layer] = [x.mT for x in keys], values
        return self._contents[layer]

    def _lines_of(self, heads: int, group: int) -> Lines:
        if (heads, group) not in self._lines:
            self._lines[heads, group] = self._make_lines(heads, group)
        return self._lines[heads, group]

    def _make_lines(self, heads: int, group: int) -> Lines:
        queries, width, device = self.rows * heads, self.width, self._place_V.device
        row_V, entry_V = self._place_V // width, self._place_V % width
        head_H = torch.arange(heads, device=device)
        place_VH = (row_V[:, None] * heads + head_H) * width + entry_V[:, None]
        # Pages of nobody go to a place of their own, and are weighted as if for the last one.
        place_VH[self._place_V == NOWHERE] = queries * width
        line_VH = self._line_VH(heads, group)
        place_L = (
            torch.empty_like(line_VH).flatten().scatter_(0, line_VH.flatten(), place_VH.flatten())
        )
        line_RHW = place_L.new_zeros(queries * width + 1)
        line_RHW = line_RHW.scatter_(0, place_L, torch.arange(len(place_L), device=device))[:-1]
        place_L = place_L.clamp_(max=queries * width - 1)
        lengths = self._lengths_R.repeat_interleave(heads)
        is_owned = torch.arange(width, device=device) < lengths[:, None]
        return Lines(
            queries=queries,
            query_L=place_L // width,
            place_L=place_L,
            line_RHW=line_RHW,
            owned=line_RHW[is_owned.flatten()],
            starts=lengths.cumsum(0) - lengths,
        )

    def _line_VH(self, heads: int, group: int) -> Tensor:
        """Return the line of each visit and head: of a page they are ordered (K, reader, G)."""
        parts, start = list[Tensor](), 0
        for part in self.ranges:
            shape = (len(part.blocks), heads // group, part.readers, group)
            line_PKRG = torch.arange(start, start + math.prod(shape), device=self._place_V.device)
            parts.append(line_PKRG.view(shape).transpose(1, 2).reshape(-1, heads))
            start += math.prod(shape)
        return torch.cat(parts)

    def _shift(
        self,
        z_RHS: Tensor,
        pos_pool: Tensor,
        spec: LayerSpec,
        positions_R: Tensor,
        is_out_R1S: Tensor,
    ) -> None:
        """Add the relative-position bias to logits, and hide what is outside the window."""
        distance_RKS = positions_R[:, None, None] - gather_pages(pos_pool, self._block_RW)
        distance_RHS = distance_RKS.repeat_interleave(spec.group, dim=1)
        if spec.bias_HT is not None:
            # What stands in unfilled slots may be no position at all.
            index_RHS = distance_RHS.masked_fill(is_out_R1S, 0)
            table_RHT = spec.bias_HT.to(z_RHS.dtype).expand(len(z_RHS), -1, -1)
            z_RHS += table_RHT.gather(2, index_RHS)
        if spec.sliding_window is not None:
            z_RHS.masked_fill_(distance_RHS >= spec.sliding_window, -torch.inf)


def _ranges(blocks: list[tuple[int, int]]) -> Iterator[Range]:
    """Yield the ranges of sorted blocks, each with its number of readers."""
    start, end, readers = -1, -1, 0
    for block, count in blocks:
        if start >= 0 and block - end <= BRIDGE and count == readers:
            end = block + 1
            continue
        if start >= 0:
            yield Range(range(start, end), readers)
        start, end, readers = block, block + 1, count
    yield Range(range(start, end), readers)
