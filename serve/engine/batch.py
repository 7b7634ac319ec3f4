"""The flat token axis of one engine step: decode rows first, then prompt chunks."""

# Legend: N tokens of the step (flat), M tokens whose logits are wanted, R decode rows,
# W table width (blocks), S slots of a row.

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.pages import PagePlan
from serve.engine.request import Item, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt chunk: its rows on the flat axis and its cache after the write."""

    sequence: Sequence
    rows: slice
    table_1W: Tensor
    length_1: Tensor
    kv_len: int
    compressed: bool

    @property
    def is_alone(self) -> bool:
        """True if the chunk attends to nothing but itself."""
        return self.kv_len == self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class Tables:
    """Block tables of the decode rows; good for as long as none of them changes.

    Attributes:
        lists: One per row.
        padded_RW: The same as an int32 matrix, padded with block 0.
        plan: How to read the pages in place, or None.
    """

    lists: list[list[int]]
    padded_RW: Tensor
    plan: PagePlan | None = None

    @classmethod
    def of(cls, tables: Rows[Rows[int]], device: torch.device, *, in_place: bool) -> "Tables":
        """Build from block tables, with a plan if pages are to be read in place."""
        lists = [list(table) for table in tables]
        padded_RW = pad_tables(lists, device, torch.int32)
        return cls(lists, padded_RW, PagePlan(lists, padded_RW) if in_place and lists else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a step runs and where each token is stored.

    Attributes:
        tokens_N: Token ids, int64.
        positions_N: Original positions, int64.
        slots_N: Cache slot of each token, ``block * block_size + offset``, int64; negative for
            padding, which is not written.
        lengths_R: Filled slots of each decode row, after the write, int32.
        tables: Block tables of the decode rows.
        sequences: The sequence of each decode row.
        chunks: Prompt chunks; their rows follow the decode rows.
        last_M: Tokens whose logits are wanted; None for all in order.
        opened: Blocks that get their first tokens, but not all.
    """

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    lengths_R: Tensor
    tables: Tables
    sequences: list[Sequence]
    chunks: list[Chunk]
    last_M: Tensor | None
    opened: list[int]

    @property
    def decodes(self) -> int:
        """Number of decode rows, R."""
        return len(self.tables.lists)


def pad_tables(
    tables: Rows[Rows[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return block tables of different lengths as one matrix (R, W), padded with block 0."""
    width = max(map(len, tables), default=0)
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return torch.tensor(padded, dtype=dtype, device=device).view(len(tables), width)


class BatchBuilder:
    """Turns the items of a step into tensors.

    Args:
        block_size: Slots per block.
        device: Where to.
        in_place: Plan how to read the pages of decode rows where they lie.
    """

    def __init__(self, block_size: int, device: torch.device, *, in_place: bool) -> None:
        self.block_size, self.device, self.in_place = block_size, device, in_place
        self._tables = Tables.of([], device, in_place=False)

    def build(
        self, items: Rows[Item], *, spans: Rows[int] | None = None, as_decodes: bool = False
    ) -> Batch:
        """Lay out the items.

        Args:
            items: What to run; lengths of the sequences are those before the step.
            spans: Of each item, how many of its last tokens the logits are wanted; one by default.
            as_decodes: Make every token a decode row; the logits of all are wanted.
        """
        is_row = [as_decodes or item.is_decode for item in items]
        order = sorted(range(len(items)), key=is_row.__getitem__, reverse=True)
        tokens, positions, slots = list[int](), list[int](), list[int]()
        lengths, rows, opened = list[int](), list[Sequence](), list[int]()
        chunks, wanted = list[Chunk](), [range(0)] * len(items)
        for index in order:
            item, start = items[index], len(tokens)
            sequence, count = item.sequence, item.count
            first, filled, end = sequence.num_tokens, sequence.kv_len, start + count
            tokens += sequence.tokens[first : first + count]
            positions += range(first, first + count)
            slots += self._slots(sequence.block_table, filled, count)
            opened += self._opened(sequence.block_table, filled, count)
            span = count if as_decodes else 1 if spans is None else spans[index]
            wanted[index] = range(end - span, end)
            if is_row[index]:
                rows += [sequence] * count
                lengths += range(filled + 1, filled + count + 1)
            else:
                chunks.append(self._chunk(item, slice(start, end)))
        last = [token for part in wanted for token in part]
        lists = [tokens, positions, slots, lengths, last]
        tokens_N, positions_N, slots_N, lengths_R, last_M = self._tensors(lists)
        return Batch(
            tokens_N=tokens_N,
            positions_N=positions_N,
            slots_N=slots_N,
            lengths_R=lengths_R.int(),
            tables=self._tables_of([row.block_table for row in rows]),
            sequences=rows,
            chunks=chunks,
            last_M=None if last == list(range(len(tokens))) else last_M,
            opened=opened,
        )

    def _tables_of(self, tables: list[list[int]]) -> Tables:
        if tables != self._tables.lists:
            self._tables = Tables.of(tables, self.device, in_place=self.in_place)
        return self._tables

    def _opened(self, table: list[int], filled: int, count: int) -> list[int]:
        """Return the last block if its first slot is written and others stay unfilled."""
        offset = (filled + count - 1) % self.block_size
        is_opened = offset < count and offset < self.block_size - 1
        return [table[(filled + count - 1) // self.block_size]] if is_opened else []

    def _slots(self, table: list[int], filled: int, count: int) -> list[int]:
        size = self.block_size
        return [table[s // size] * size + s % size for s in range(filled, filled + count)]

    def _chunk(self, item: Item, rows: slice) -> Chunk:
        sequence = item.sequence
        kv_len = sequence.kv_len + item.count
        table = sequence.block_table[: -(-kv_len // self.block_size)]
        table_W, length_1 = self._tensors([table, [kv_len]])
        return Chunk(sequence, rows, table_W[None], length_1, kv_len, sequence.compressed)

    def _tensors(self, lists: list[list[int]]) -> tuple[Tensor, ...]:
        """Return lists as int64 tensors, in one transfer."""
        joined = [value for values in lists for value in values]
        whole = torch.tensor(joined, dtype=torch.int64, device=self.device)
        return whole.split([len(values) for values in lists])
