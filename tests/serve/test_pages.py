"""Decode attention over pages in place, and the writes that it relies on."""

import pytest
import torch

from serve.decoder import LayerSpec
from serve.engine.batch import pad_tables
from serve.engine.pages import PagePlan, Range
from serve.engine.pools import LayerPool, Pools, SlotWriter
from serve.kernels import paged_decode

EXACT = 1e-12  # float64, a few hundred terms
BLOCKS, SIZE, WIDTH, CONTEXT = 23, 4, 6, 100
CPU = torch.device("cpu")

# Rows of block ids: in order, out of order, with gaps to bridge, far apart, of unequal lengths.
TABLES = {
    "one": [[3, 4, 5]],
    "one_reversed": [[9, 8, 7]],
    "one_scattered": [[20, 1, 11, 3]],
    "lockstep": [[0, 3, 6], [1, 4, 7], [2, 5, 8]],
    "unequal": [[0, 9, 22], [4], [7, 1]],
    "same": [[3, 8]] * 3,
    "shared_prefix": [[4, 5, 0], [4, 5, 1], [4, 5, 20, 7], [9]],
    "nested_prefixes": [[4, 5, 0], [4, 6], [4, 5, 6, 1]],
}


def make_spec(kv_heads: int, group: int, *, bias: bool, window: int | None) -> LayerSpec:
    """Return a layer; its bias is random."""
    heads = kv_heads * group
    return LayerSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=WIDTH,
        content_heads=heads,
        scale=0.7,
        inverse_frequency=torch.ones(WIDTH // 2, dtype=torch.float64),
        bias_HT=torch.randn(heads, CONTEXT, dtype=torch.float64) if bias else None,
        sliding_window=window,
    )


def make_pool(kv_heads: int, dtype: torch.dtype = torch.float64) -> LayerPool:
    """Return random keys and values at random positions."""
    shape = (BLOCKS, kv_heads, SIZE)
    keys, values = (torch.randn(*shape, WIDTH, dtype=dtype) for _ in range(2))
    return LayerPool(keys, values, torch.randint(CONTEXT, shape, dtype=torch.int32))


def filled(tables: list[list[int]], missing: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lengths ``missing`` slots short of the rows, and which slots are unfilled."""
    lengths_R = torch.tensor([len(table) * SIZE - missing for table in tables])
    slots = SIZE * max(map(len, tables))
    return lengths_R, torch.arange(slots) >= lengths_R[:, None, None]


@pytest.mark.parametrize("freedom", ["plain", "bias", "window", "bias_and_window"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_attend_equals_paged_decode(name: str, heads: tuple[int, int], freedom: str) -> None:
    """Oracle: the reference of paged attention, which gathers; foreign pages hold NaN."""
    tables = TABLES[name]
    spec = make_spec(*heads, bias="bias" in freedom, window=90 if "window" in freedom else None)
    pool = make_pool(heads[0])
    owned = {block for table in tables for block in table}
    for block in set(range(BLOCKS)) - owned:
        pool.keys[block], pool.values[block] = torch.nan, torch.nan
    lengths_R, is_out_R1S = filled(tables, missing=3)
    padded_RW = pad_tables(tables, CPU)
    positions_R = torch.full((len(tables),), CONTEXT - 1)
    # The query's own key, which a window never hides.
    for table in tables:
        pool.positions[table[-1], :, 0] = CONTEXT - 1
    q_RHD = torch.randn(len(tables), spec.heads, WIDTH, dtype=torch.float64)
    plan = PagePlan(tables, padded_RW)
    o_RHD, z_RHS = plan.attend(0, q_RHD, pool, spec, positions_R, is_out_R1S)
    expected, lse_RH = paged_decode(
        q_RHD,
        *pool.tensors,
        padded_RW,
        lengths_R,
        positions_R,
        spec.scale,
        spec.bias_HT,
        window=spec.sliding_window,
    )
    torch.testing.assert_close(o_RHD, expected, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(z_RHS.logsumexp(-1), lse_RH, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("heads", [(1, 1), (1, 4), (6, 1)], ids=str)
def test_attend_does_not_depend_on_the_place_of_pages(heads: tuple[int, int]) -> None:
    """Oracle: bitwise equality after moving the blocks, in float32: deterministic mode needs it."""
    spec, pool = make_spec(*heads, bias=False, window=None), make_pool(heads[0], torch.float32)
    q_1HD = torch.randn(1, spec.heads, WIDTH)
    _, is_out_11S = filled([[0] * 4], missing=1)
    outputs = []
    for table in ([2, 3, 4, 5], [9, 1, 8, 22], [11, 13, 12, 10]):
        moved = LayerPool(*(torch.zeros_like(x) for x in pool.tensors))
        for old, new in enumerate(table):
            moved.keys[new], moved.values[new] = pool.keys[old], pool.values[old]
        plan = PagePlan([table], pad_tables([table], CPU))
        outputs.append(plan.attend(0, q_1HD, moved, spec, torch.tensor([9]), is_out_11S)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_pages_are_read_once_however_many_rows_share_them() -> None:
    """Oracle: the definition of ranges."""
    tables = [[4, 5, 0], [4, 5, 1], [4, 5, 2]]
    plan = PagePlan(tables, pad_tables(tables, CPU))
    assert plan.ranges == [Range(range(0, 3), 1), Range(range(4, 6), 3)]


class _Layers:
    """The part of a decoder that pools read."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, *kv_heads: int) -> None:
        self.layers = [make_spec(heads, 2, bias=False, window=None) for heads in kv_heads]
        self.groups = tuple(
            tuple(i for i, other in enumerate(kv_heads) if other == heads)
            for heads in dict.fromkeys(kv_heads)
        )


def test_writer_puts_tokens_into_their_slots() -> None:
    """Oracle: indexing by block and offset, layer by layer; all else stays zero."""
    kv_heads = (2, 3, 2)
    pools = Pools(_Layers(*kv_heads), BLOCKS, SIZE)
    slots_N, positions_N = torch.tensor([13, 5, 88, 0]), torch.tensor([41, 7, 0, 99])
    writer = SlotWriter(pools, positions_N, slots_N)
    for layer, heads in enumerate(kv_heads):
        # As queries, keys and values come from one product: slices of a wider tensor.
        k_NKD, v_NKD = torch.randn(4, 2 * heads, WIDTH, dtype=torch.float64).chunk(2, dim=1)
        writer.write(layer, k_NKD, v_NKD)
        expected = LayerPool(*(torch.zeros_like(x) for x in pools.layers[layer].tensors))
        for token, slot in enumerate(slots_N.tolist()):
            block, offset = divmod(slot, SIZE)
            expected.keys[block, :, offset] = k_NKD[token]
            expected.values[block, :, offset] = v_NKD[token]
            expected.positions[block, :, offset] = int(positions_N[token])
        for found, wanted in zip(pools.layers[layer].tensors, expected.tensors, strict=True):
            assert torch.equal(found, wanted)


def test_wipe_zeroes_the_values_of_blocks_in_every_layer() -> None:
    """Oracle: the definition; other blocks, keys and positions stay."""
    pools = Pools(_Layers(1, 2, 1), BLOCKS, SIZE)
    for pool in pools.layers:
        pool.values.fill_(torch.nan)
        pool.keys.fill_(1.0)
    pools.wipe([])
    pools.wipe([3, 0])
    for pool in pools.layers:
        assert pool.values[[0, 3]].eq(0).all()
        assert pool.values[[1, 2, *range(4, BLOCKS)]].isnan().all()
        assert pool.keys.eq(1).all()
