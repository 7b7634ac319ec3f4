"""Decode attention: against exponentials and sums, one slot at a time, in float64."""

import math

import pytest
import torch

from serve.kernels import paged_decode, reference_decode

EXACT = 1e-12  # float64 sums of a few dozen terms of size one
SINGLE = 1e-5  # float32 sums of a few dozen terms of size one


def attend(paged, q, cache, lengths, positions, scale, bias, window):
    """Return output and log-sum-exp of every (row, head), summed slot by slot."""
    k_pool, v_pool, pos_pool, tables = cache
    rows, heads, width = q.shape
    group = heads // k_pool.shape[1]
    o = torch.zeros(rows, heads, width, dtype=torch.float64)
    lse = torch.full((rows, heads), -math.inf, dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            total, mixed = 0.0, torch.zeros(width, dtype=torch.float64)
            for slot in range(int(lengths[row, head // group])):
                where = (tables, row, head // group, slot)
                distance = int(positions[row]) - int(paged.slot_of(pos_pool, *where))
                if window is not None and distance >= window:
                    continue
                z = scale * float(q[row, head] @ paged.slot_of(k_pool, *where))
                z += 0.0 if bias is None else float(bias[head, distance])
                total += math.exp(z)
                mixed += math.exp(z) * paged.slot_of(v_pool, *where)
            if total > 0:
                o[row, head], lse[row, head] = mixed / total, math.log(total)
    return o, lse


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("window", [None, 9, 6, 1])
@pytest.mark.parametrize("lengths", [[10, 4, 1], [0, 8, 13], [[10, 3], [0, 6], [7, 7]]])
def test_attention_is_the_softmax_over_what_counts(paged, group, with_bias, window, lengths):
    """Oracle: exponentials and sums, bias and window at the distance of original positions."""
    lengths = torch.tensor(lengths)
    per_head = lengths if lengths.ndim == 2 else lengths[:, None].expand(3, 2)
    cache = paged.make_cache(per_head.amax(1).tolist(), seed=1)
    q = torch.randn(3, 2 * group, 8, dtype=torch.float64)
    positions = per_head.amax(1) + 5
    bias = torch.randn(2 * group, 40, dtype=torch.float64) if with_bias else None
    o, lse = paged_decode(q, *cache, lengths, positions, 0.37, bias, window=window)
    want_o, want_lse = attend(paged, q, cache, per_head, positions, 0.37, bias, window)
    assert paged.gap(o, want_o) < EXACT
    assert paged.gap(lse, want_lse) < EXACT


def test_a_row_of_length_zero_is_zero_and_minus_infinity(paged):
    """Oracle: the contract, alone and beside another row."""
    k_pool, v_pool, pos_pool, tables = paged.make_cache([3, 0], dtype=torch.float32)
    q, lengths = torch.randn(2, 2, 8), torch.tensor([3, 0])
    for rows in (slice(0, 2), slice(1, 2)):
        part = (tables[rows], lengths[rows], lengths[rows])
        o, lse = paged_decode(q[rows], k_pool, v_pool, pos_pool, *part, 1.0)
        assert bool((o[-1] == 0).all())
        assert bool((lse[-1] == -math.inf).all())
    assert bool(o.isfinite().all())


def test_a_row_does_not_depend_on_the_batch(paged):
    """Property: a row's result is the same alone and beside longer rows, to float32 rounding."""
    lengths = torch.tensor([5, 17])
    k_pool, v_pool, pos_pool, tables = paged.make_cache([5, 17], dtype=torch.float32)
    pools = (k_pool, v_pool, pos_pool)
    q = torch.randn(2, 4, 8)
    both = paged_decode(q, *pools, tables, lengths, lengths, 0.2)
    alone = paged_decode(q[:1], *pools, tables[:1, :2], lengths[:1], lengths[:1], 0.2)
    for x, y in zip(both, alone, strict=True):
        assert float((x[:1] - y).abs().max()) < SINGLE


def test_attention_does_not_depend_on_the_order_of_slots(paged):
    """Property: permuting keys, values and positions together leaves the output."""
    k_pool, v_pool, pos_pool, tables = paged.make_cache([16])
    q, bias = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    length, position = torch.tensor([16]), torch.tensor([21])
    rest = (tables, length, position, 0.3, bias)
    o, lse = paged_decode(q, k_pool, v_pool, pos_pool, *rest, window=15)
    pages = tables[0, :4].long()
    for pool in (k_pool, v_pool, pos_pool):
        slots = pool[pages].transpose(1, 2).flatten(0, 1)  # (S, K, ...)
        slots = slots[torch.randperm(16, generator=torch.Generator().manual_seed(7))]
        pool[pages] = slots.unflatten(0, (4, 4)).transpose(1, 2)
    other_o, other_lse = paged_decode(q, k_pool, v_pool, pos_pool, *rest, window=15)
    assert float((o - other_o).abs().max()) < EXACT
    assert float((lse - other_lse).abs().max()) < EXACT


@pytest.mark.parametrize("lengths", [[37], [40], [37, 21], [[37, 30]], [3]])
@pytest.mark.parametrize("first", [0, 2, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reading_in_place_is_reading(paged, monkeypatch, lengths, first, dtype):
    """Oracle: the gathering path, on consecutive pages at either end of a pool or shuffled."""
    lengths = torch.tensor(lengths)
    longest = lengths.amax() if lengths.ndim == 1 else lengths.amax(1).amax()
    rows, pages = len(lengths), 10
    cache = paged.make_cache([int(longest)] * rows, dtype=dtype, seed=3)
    order = torch.randperm(rows * pages) if first is None else first + torch.arange(rows * pages)
    tables = order.view(rows, pages)
    pools = []
    for pool in cache[:3]:
        moved = torch.full((rows * pages + 2, *pool.shape[1:]), -7).to(pool.dtype)
        if pool.dtype.is_floating_point:
            moved.fill_(math.nan)
        used = cache[3] >= 0
        moved[tables[:, : used.shape[1]][used[:, :pages]]] = pool[cache[3][used].long()]
        pools.append(moved)
    q = torch.randn(rows, 4, 8).to(dtype)
    rest = (tables, lengths, torch.full((rows,), 60), 0.3, torch.randn(4, 80))
    want = paged_decode(q, *pools, *rest, window=50)
    monkeypatch.setattr(reference_decode, "LONG", 1)
    got = paged_decode(q, *pools, *rest, window=50)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        tolerance = {torch.float64: EXACT, torch.float32: SINGLE}.get(x.dtype, 2**-7)
        assert paged.gap(x, y) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_narrow_pool_gives_the_attention_of_its_rounded_content(paged, dtype):
    """Oracle: float64 on the rounded content; only the output is rounded once more."""
    k_pool, v_pool, pos_pool, tables = paged.make_cache([40, 23], width=32, dtype=dtype)
    q, lengths = torch.randn(2, 4, 32).to(dtype), torch.tensor([40, 23])
    o, lse = paged_decode(q, k_pool, v_pool, pos_pool, tables, lengths, lengths, 0.2)
    exact_o, exact_lse = paged_decode(
        q.double(), k_pool.double(), v_pool.double(), pos_pool, tables, lengths, lengths, 0.2
    )
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    assert float((lse - exact_lse).abs().max()) < SINGLE
    assert float((o.double() - exact_o).abs().max()) < (
        2**-8 if dtype == torch.bfloat16 else SINGLE
    )


PROGRAM = """
    # (dtype, width, KV heads, group, block size, lengths): padded widths and groups, ragged
    # tiles, one to four parts of 256 slots, empty parts and rows; 49 programs
    cases = [
        (torch.float32, 12, 2, 2, 16, [80, 37, 1, 0]),
        (torch.bfloat16, 16, 1, 4, 4, [70, 600]),
        (torch.float16, 32, 2, 1, 16, [33]),
        (torch.float32, 64, 1, 8, 32, [1000]),
        (torch.bfloat16, 8, 2, 1, 16, [300, 20]),
    ]
    for index, (dtype, width, kv_heads, group, block_size, lengths) in enumerate(cases):
        rows = len(lengths)
        tables, blocks = tables_of(lengths, block_size, spare=2)
        shape = (blocks, kv_heads, block_size)
        pools = [torch.randn(*shape, width).to(dtype) for _ in range(2)]
        position = torch.randint(0, 600, shape).int()
        length = torch.tensor(lengths)
        if index in (0, 4):
            length = (length[:, None] - torch.tensor([0, 5])).clamp(min=0)
        q = torch.randn(rows, kv_heads * group, width).to(dtype)
        bias = torch.randn(kv_heads * group, 700) if index in (1, 3, 4) else None
        window = 300 if index in (2, 3, 4) else None
        where = torch.full((rows,), 620)
        arguments = (tables, length, where, 0.3)
        o, lse = kernels.paged_decode(
            q, *pools, position, *arguments, bias, window=window, backend="triton"
        )
        want_o, want_lse = kernels.paged_decode(
            q.double(), *(pool.double() for pool in pools), position, *arguments,
            bias, window=window,
        )
        assert o.dtype == dtype and lse.dtype == torch.float32
        assert gap(lse, want_lse) < 1e-5, index
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert gap(o, want_o) < tolerance, index
        if index == 4:
            alone = kernels.paged_decode(
                q[1:], *pools, position, tables[1:, :2], length[1:], where[1:], 0.3, bias,
                window=window, backend="triton",
            )
            assert torch.equal(alone[0], o[1:]) and torch.equal(alone[1], lse[1:])
    try:
        kernels.paged_decode(q, *pools, position, tables + 1000, *arguments[1:], backend="triton")
    except ShapeError:
        pass
    else:
        raise AssertionError("a page outside the pool was read")
"""


@pytest.mark.slow
def test_triton_attends_alike_under_the_interpreter(interpreted):
    """Oracle: the float64 torch reference on the same content; a row alone equals it in a batch."""
    interpreted(PROGRAM)
