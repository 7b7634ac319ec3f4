"""Kernels against loops over single slots, and the Triton kernel against the torch reference."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from common.errors import BackendError, ConfigError, ShapeError
from serve.kernels import compact_kv, gather_pages, paged_decode, score_keys

ROOT = Path(__file__).resolve().parents[3]
EXACT = 1e-12  # float64 sums of a few dozen terms of size one
SINGLE = 1e-5  # float32 sums of a few dozen terms of size one


def make_cache(lengths, *, kv_heads=2, width=8, block_size=4, dtype=torch.float64, seed=0):
    """Pools with shuffled pages, a padded table and per-head positions; slack holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // block_size) for length in lengths]
    blocks = sum(pages) + 3
    table_width = max(max(pages), 1) + 1
    order = torch.randperm(blocks, generator=generator)
    tables = torch.full((len(lengths), table_width), -1, dtype=torch.int32)
    shape = (blocks, kv_heads, block_size)
    k_pool = torch.full((*shape, width), math.nan, dtype=dtype)
    v_pool = torch.full((*shape, width), math.nan, dtype=dtype)
    pos_pool = torch.full(shape, -7, dtype=torch.int32)
    start = 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        tables[row, :count] = order[start : start + count].int()
        start += count
        for head in range(kv_heads):
            positions = torch.randperm(length + 5, generator=generator)[:length].sort().values
            for slot in range(length):
                page = int(tables[row, slot // block_size])
                at = (page, head, slot % block_size)
                k_pool[at] = torch.randn(width, generator=generator, dtype=torch.float64).to(dtype)
                v_pool[at] = torch.randn(width, generator=generator, dtype=torch.float64).to(dtype)
                pos_pool[at] = int(positions[slot])
    return k_pool, v_pool, pos_pool, tables


def slot_of(pool, tables, row, head, slot):
    """Read one slot of one head through the block table."""
    block_size = pool.shape[2]
    return pool[int(tables[row, slot // block_size]), head, slot % block_size]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_score_keys_equals_the_sum_over_bands(group):
    """Oracle: complex products and moduli, one slot at a time."""
    lengths = torch.tensor([9, 1, 0])
    k_pool, _, _, tables = make_cache(lengths.tolist())
    heads, width = 2 * group, 8
    u = torch.randn(3, heads, width, dtype=torch.float64)
    e = torch.rand(3, heads, width // 2, dtype=torch.float64)
    raw = score_keys(k_pool, tables, lengths, u, e)
    assert raw.dtype == torch.float64
    assert raw.shape == (3, heads, tables.shape[1] * 4)
    for row, length in enumerate(lengths.tolist()):
        assert bool((raw[row, :, length:] == -math.inf).all())
        for head in range(heads):
            for slot in range(length):
                key = slot_of(k_pool, tables, row, head // group, slot).tolist()
                expected = 0.0
                for band in range(4):
                    z = complex(key[band], key[band + 4])
                    w = complex(u[row, head, band], u[row, head, band + 4])
                    expected += (w.conjugate() * z).real + abs(z) * float(e[row, head, band])
                assert abs(float(raw[row, head, slot]) - expected) < EXACT


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_paged_decode_equals_softmax_over_original_positions(group, with_bias):
    """Oracle: exponentials and sums, one slot at a time, bias at the distance of the position."""
    lengths = torch.tensor([10, 4, 1])
    k_pool, v_pool, pos_pool, tables = make_cache(lengths.tolist(), seed=1)
    heads, scale = 2 * group, 0.37
    q = torch.randn(3, heads, 8, dtype=torch.float64)
    positions = lengths + 5
    bias = torch.randn(heads, 40, dtype=torch.float64) if with_bias else None
    o, lse = paged_decode(q, k_pool, v_pool, pos_pool, tables, lengths, positions, scale, bias)
    for row, length in enumerate(lengths.tolist()):
        for head in range(heads):
            total, mixed = 0.0, torch.zeros(8, dtype=torch.float64)
            for slot in range(length):
                where = (tables, row, head // group, slot)
                z = scale * float(q[row, head] @ slot_of(k_pool, *where))
                if with_bias:
                    z += float(bias[head, int(positions[row]) - int(slot_of(pos_pool, *where))])
                total += math.exp(z)
                mixed += math.exp(z) * slot_of(v_pool, *where)
            assert abs(float(lse[row, head]) - math.log(total)) < EXACT
            assert float((o[row, head] - mixed / total).abs().max()) < EXACT


def test_paged_decode_of_an_empty_row_is_zero():
    """Oracle: the contract (zeros, log-sum-exp of nothing)."""
    lengths = torch.tensor([3, 0])
    k_pool, v_pool, pos_pool, tables = make_cache(lengths.tolist(), dtype=torch.float32)
    q = torch.randn(2, 2, 8)
    o, lse = paged_decode(q, k_pool, v_pool, pos_pool, tables, lengths, lengths, 1.0)
    assert bool((o[1] == 0).all())
    assert bool((lse[1] == -math.inf).all())
    assert bool(o[0].isfinite().all())


def test_paged_decode_does_not_depend_on_the_batch():
    """Property: a row's result is the same alone and beside longer rows, to float32 rounding."""
    lengths = torch.tensor([5, 17])
    k_pool, v_pool, pos_pool, tables = make_cache(lengths.tolist(), dtype=torch.float32)
    q = torch.randn(2, 4, 8)
    both = paged_decode(q, k_pool, v_pool, pos_pool, tables, lengths, lengths, 0.2)
    alone = paged_decode(
        q[:1], k_pool, v_pool, pos_pool, tables[:1, :2], lengths[:1], lengths[:1], 0.2
    )
    for x, y in zip(both, alone, strict=True):
        assert float((x[:1] - y).abs().max()) < SINGLE


@pytest.mark.parametrize("target", ["new", "same", "crossed"])
def test_compact_kv_moves_each_heads_own_slots(target):
    """Oracle: holes and movers paired in a loop; other rows' pages stay bit-identical."""
    lengths = torch.tensor([11, 9, 6])
    k_pool, v_pool, pos_pool, tables = make_cache(lengths.tolist(), seed=2)
    keep = torch.stack(
        [
            torch.stack([torch.randperm(int(n))[:6].sort().values for _ in range(2)])
            for n in lengths[:2]
        ]
    )
    src = tables[:2]
    used = {int(page) for page in tables.flatten() if page >= 0}
    free = [page for page in range(k_pool.shape[0]) if page not in used]
    assert len(free) >= 3
    dst = src[:, :2].clone()
    if target == "crossed":
        dst = dst.flip(1)
    if target == "new":
        dst[0] = torch.tensor(free[:2])
        dst[1, 1] = free[2]
    before = [pool.clone() for pool in (k_pool, v_pool, pos_pool)]
    compact_kv((k_pool, v_pool, pos_pool), src, keep, dst)
    for pool, old in zip((k_pool, v_pool, pos_pool), before, strict=True):
        for row in range(2):
            for head in range(2):
                kept = keep[row, head].tolist()
                movers = [slot for slot in kept if slot >= 6]
                for slot in range(6):
                    moved = slot_of(pool, dst, row, head, slot)
                    source = slot if slot in kept else movers.pop(0)
                    assert torch.equal(moved, slot_of(old, src, row, head, source))
        for page in tables[2][tables[2] >= 0].tolist():
            assert torch.equal(pool[page].nan_to_num(), old[page].nan_to_num())


def test_compaction_to_the_kept_set_leaves_attention_unchanged():
    """Property: attention over compacted pages equals attention over the kept slots alone."""
    lengths = torch.tensor([13])
    k_pool, v_pool, pos_pool, tables = make_cache([13], seed=3)
    q, bias = torch.randn(1, 4, 8, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    keep = torch.stack([torch.randperm(13)[:7].sort().values for _ in range(2)])[None]
    k, v = gather_pages(k_pool, tables), gather_pages(v_pool, tables)
    pos = gather_pages(pos_pool, tables).long()
    expected = []
    for head in range(4):
        slots = keep[0, head // 2]
        z = 0.5 * k[0, head // 2, slots] @ q[0, head] + bias[head, 20 - pos[0, head // 2, slots]]
        expected.append(z.softmax(0) @ v[0, head // 2, slots])
    compact_kv((k_pool, v_pool, pos_pool), tables, keep, tables)
    length, position = torch.tensor([7]), torch.tensor([20])
    o, _ = paged_decode(q, k_pool, v_pool, pos_pool, tables, length, position, 0.5, bias)
    assert lengths[0] == 13
    assert float((o[0] - torch.stack(expected)).abs().max()) < EXACT


def test_backend_and_shape_mistakes_are_one_line():
    """Oracle: the error contract of the dispatcher."""
    lengths = torch.tensor([3])
    k_pool, v_pool, pos_pool, tables = make_cache([3])
    u, e = torch.zeros(1, 2, 8), torch.zeros(1, 2, 4)
    with pytest.raises(BackendError, match="CUDA"):
        score_keys(k_pool, tables, lengths, u, e, backend="triton")
    with pytest.raises(ConfigError, match="auto, torch, triton"):
        score_keys(k_pool, tables, lengths, u, e, backend="cuda")
    with pytest.raises(ShapeError, match="multiple of K"):
        score_keys(k_pool, tables, lengths, torch.zeros(1, 3, 8), e)
    with pytest.raises(ShapeError, match="one weight per query head"):
        score_keys(k_pool, tables, lengths, u, torch.zeros(1, 2, 8))
    keep = torch.zeros(1, 2, 9, dtype=torch.int64)
    with pytest.raises(ShapeError, match="destination slots"):
        compact_kv((k_pool, v_pool, pos_pool), tables, keep, tables)


INTERPRETED = """
    import os
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from serve.kernels import score_keys
    from common.errors import ShapeError
    torch.manual_seed(0)
    # (dtype, width, KV heads, group, block size, lengths): ragged tails, padded bands, a full tile
    cases = [
        (torch.float32, 12, 2, 2, 16, [80, 37, 64, 1]),
        (torch.bfloat16, 8, 1, 4, 4, [70, 0]),
        (torch.float16, 16, 2, 1, 128, [130]),
    ]
    for dtype, width, kv_heads, group, block_size, lengths in cases:
        rows, pages = len(lengths), -(-max(lengths) // block_size) + 1
        tables = torch.randperm(rows * pages + 2)[: rows * pages].view(rows, pages).int()
        pool = torch.randn(rows * pages + 2, kv_heads, block_size, width).to(dtype)
        length = torch.tensor(lengths)
        used = torch.arange(pages) * block_size < length[:, None]
        tables = torch.where(used, tables, -1)
        u = torch.randn(rows, kv_heads * group, width)
        e = torch.rand(kv_heads * group, width // 2).expand(rows, -1, -1)
        got = score_keys(pool, tables, length, u, e, backend="triton")
        want = score_keys(pool.double(), tables, length, u.double(), e.double())
        finite = want.isfinite()
        assert bool((got.isfinite() == finite).all()), lengths
        assert float((got.double() - want)[finite].abs().max()) < 1e-5, (dtype, lengths)
    try:
        score_keys(pool, tables + 1000, length, u, e, backend="triton")
    except ShapeError:
        print("agrees")
"""


def test_triton_score_kernel_agrees_under_the_interpreter():
    """Oracle: the float64 torch reference on the same (rounded) keys; 26 programs."""
    script = textwrap.dedent(INTERPRETED)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=110, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agrees"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_score_kernel_agrees_on_the_device(dtype):
    """Oracle: the float64 torch reference on the same (rounded) keys."""
    lengths = torch.tensor([300, 37, 0])
    k_pool, _, _, tables = make_cache([300, 37, 0], width=64, block_size=16, dtype=dtype)
    u, e = torch.randn(3, 8, 64), torch.rand(3, 8, 32)
    want = score_keys(k_pool.double(), tables, lengths, u.double(), e.double())
    on_device = [x.cuda() for x in (k_pool, tables, lengths, u, e)]
    got = score_keys(*on_device).cpu().double()
    finite = want.isfinite()
    assert bool((got.isfinite() == finite).all())
    assert float((got - want)[finite].abs().max()) < 10 * SINGLE
