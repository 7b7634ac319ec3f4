"""The layout of a step."""

import pytest
import torch

from serve.engine.batch import BatchBuilder
from serve.engine.request import Item, Request, Sequence

CPU = torch.device("cpu")
SIZE = 4


def sequence(tokens: int, done: int, table: list[int], *, kv_len: int | None = None) -> Sequence:
    """Return a running sequence; token i is 100 + i."""
    request = Request.__new__(Request)
    found = Sequence(request=request, tokens=[100 + i for i in range(tokens)], num_tokens=done)
    found.kv_len = done if kv_len is None else kv_len
    found.block_table.extend(table)
    return found


def test_decodes_come_first_and_logits_in_the_order_of_the_items() -> None:
    """Oracle: written out by hand."""
    prompt = sequence(6, 0, [7, 2])
    decode = sequence(10, 9, [5, 0, 3], kv_len=8)
    items = [Item(sequence=prompt, count=5), Item(sequence=decode, count=1)]
    batch = BatchBuilder(SIZE, CPU, in_place=True).build(items)
    assert batch.tokens_N.tolist() == [109, 100, 101, 102, 103, 104]
    assert batch.positions_N.tolist() == [9, 0, 1, 2, 3, 4]
    assert batch.slots_N.tolist() == [12, 28, 29, 30, 31, 8]
    assert batch.lengths_R.tolist() == [9]
    assert batch.tables.padded_RW.tolist() == [[5, 0, 3]]
    assert batch.sequences == [decode]
    assert batch.last_M.tolist() == [5, 0]
    (chunk,) = batch.chunks
    assert chunk.sequence is prompt
    assert (chunk.rows, chunk.kv_len, chunk.length_1.tolist()) == (slice(1, 6), 5, [5])
    assert chunk.table_1W.tolist() == [[7, 2]]
    assert chunk.is_alone
    assert batch.opened == [3, 2]


def test_decodes_alone_want_all_logits_in_order() -> None:
    """Oracle: the definition of ``last_M``."""
    items = [Item(sequence=sequence(3, 2, [i]), count=1) for i in (1, 4)]
    assert BatchBuilder(SIZE, CPU, in_place=True).build(items).last_M is None


def test_spans_ask_for_logits_of_several_tokens() -> None:
    """Oracle: written out by hand."""
    items = [
        Item(sequence=sequence(6, 2, [0, 1]), count=3),
        Item(sequence=sequence(9, 8, [2, 3, 4]), count=1),
    ]
    batch = BatchBuilder(SIZE, CPU, in_place=True).build(items, spans=[2, 1])
    assert batch.last_M.tolist() == [2, 3, 0]
    assert not batch.chunks[0].is_alone


def test_as_decodes_makes_every_token_a_row() -> None:
    """Oracle: written out by hand."""
    item = Item(sequence=sequence(9, 3, [6, 1]), count=3)
    batch = BatchBuilder(SIZE, CPU, in_place=True).build([item], as_decodes=True)
    assert batch.lengths_R.tolist() == [4, 5, 6]
    assert batch.tables.padded_RW.tolist() == [[6, 1]] * 3
    assert batch.decodes == 3
    assert batch.last_M is None


def test_tables_are_kept_until_one_changes() -> None:
    """Oracle: object identity; a table that grew in place is a change."""
    builder, running = BatchBuilder(SIZE, CPU, in_place=True), sequence(12, 2, [3])
    first = builder.build([Item(sequence=running, count=1)]).tables
    running.advance(1)
    assert builder.build([Item(sequence=running, count=1)]).tables is first
    running.advance(1)
    running.block_table.append(8)
    grown = builder.build([Item(sequence=running, count=1)]).tables
    assert grown.padded_RW.tolist() == [[3, 8]]
    assert grown.plan is not None


@pytest.mark.parametrize("filled", range(2 * SIZE))
@pytest.mark.parametrize("count", range(1, 2 * SIZE + 2))
def test_opened_blocks_are_those_with_new_unfilled_slots(filled: int, count: int) -> None:
    """Oracle: brute force over slots."""
    table = [9, 4, 6, 2, 8]
    running = sequence(40, filled, table)
    batch = BatchBuilder(SIZE, CPU, in_place=False).build([Item(sequence=running, count=count)])
    written = set(range(filled, filled + count))
    expected = [
        block
        for index, block in enumerate(table)
        if index * SIZE in written and not set(range(index * SIZE, (index + 1) * SIZE)) <= written
    ]
    assert batch.opened == expected
