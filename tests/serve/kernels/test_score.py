"""Key scoring: against the published definition with explicit positions, and against loops."""

import math

import pytest
import torch

from serve.kernels import gather_pages, score_keys

EXACT = 1e-12  # float64 sums of a few dozen terms of size one
LAYOUTS = [(False, 4), (True, 4), (False, 3), (True, 2), (False, 0)]  # interleaved, bands of D = 8
LAYOUT_IDS = ["half", "interleaved", "half-partial", "interleaved-partial", "none"]


def components(band, bands, interleaved):
    """Where the real and the imaginary part of a band are."""
    return (2 * band, 2 * band + 1) if interleaved else (band, band + bands)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize(("interleaved", "bands"), LAYOUTS, ids=LAYOUT_IDS)
def test_score_equals_the_sum_over_bands(paged, group, interleaved, bands):
    """Oracle: complex products and moduli, one slot at a time."""
    lengths = torch.tensor([9, 1, 0])
    k_pool, _, _, tables = paged.make_cache(lengths.tolist())
    heads, width = 2 * group, 8
    u = torch.randn(3, heads, width, dtype=torch.float64)
    e = torch.rand(3, heads, width - bands, dtype=torch.float64)
    raw = score_keys(k_pool, tables, lengths, u, e, bands=bands, interleaved=interleaved)
    assert raw.dtype == torch.float64
    assert raw.shape == (3, heads, tables.shape[1] * 4)
    for row, length in enumerate(lengths.tolist()):
        assert bool((raw[row, :, length:] == -math.inf).all())
        for head in range(heads):
            for slot in range(length):
                key = paged.slot_of(k_pool, tables, row, head // group, slot).tolist()
                form, weight = u[row, head].tolist(), e[row, head].tolist()
                expected = 0.0
                for band in range(bands):
                    re, im = components(band, bands, interleaved)
                    z, w = complex(key[re], key[im]), complex(form[re], form[im])
                    expected += (w.conjugate() * z).real + abs(z) * weight[band]
                for j, i in enumerate(range(2 * bands, width)):
                    expected += form[i] * key[i] + weight[bands + j] * abs(key[i])
                assert abs(float(raw[row, head, slot]) - expected) < EXACT


@pytest.mark.parametrize(("interleaved", "bands"), LAYOUTS[:4], ids=LAYOUT_IDS[:4])
def test_score_equals_the_mean_over_future_offsets(interleaved, bands):
    """Oracle: the published definition, cosines of positions and phases, offset by offset."""
    generator = torch.Generator().manual_seed(3)
    slots, width, position = 12, 8, 5000.0
    offsets = 2.0 ** torch.arange(10, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(bands, dtype=torch.float64) / bands)
    key_positions = torch.randint(0, 5000, (slots,), generator=generator).double()
    key = torch.randn(slots, width, generator=generator, dtype=torch.float64)
    mean = torch.randn(2, bands, generator=generator, dtype=torch.complex128)
    e = torch.rand(1, 2, width - bands, generator=generator, dtype=torch.float64)
    re, im = zip(*(components(f, bands, interleaved) for f in range(bands)), strict=True)
    before = torch.complex(key[:, list(re)], key[:, list(im)])

    distance = position - key_positions[:, None] + offsets  # (S, O)
    phase = mean.angle()[:, None, None] - before.angle()[None, :, None]
    cosine = torch.cos(distance[None, ..., None] * frequency + phase)  # (H, S, O, F)
    expected = (mean.abs()[:, None, None] * before.abs()[None, :, None] * cosine).sum(-1).mean(-1)
    expected += (e[0, :, None, :bands] * before.abs()).sum(-1)
    expected += (e[0, :, None, bands:] * key[:, 2 * bands :].abs()).sum(-1)

    rotated = before * torch.exp(1j * frequency * key_positions[:, None])
    key[:, list(re)], key[:, list(im)] = rotated.real, rotated.imag
    mean_turn = torch.exp(1j * frequency * offsets[:, None]).mean(0)
    form = mean * mean_turn * torch.exp(1j * frequency * position)
    u = torch.zeros(1, 2, width, dtype=torch.float64)
    u[0, :, list(re)], u[0, :, list(im)] = form.real, form.imag
    pool = key.view(3, 1, 4, width)
    table, length = torch.tensor([[0, 1, 2]]), torch.tensor([slots])
    raw = score_keys(pool, table, length, u, e, bands=bands, interleaved=interleaved)
    assert float((raw[0] - expected).abs().max()) < 1e-11  # phases of 5000 radians


def test_lengths_may_differ_by_head(paged):
    """Oracle: the call with each length for all heads."""
    k_pool, _, _, tables = paged.make_cache([9, 9])
    u, e = torch.randn(2, 4, 8), torch.rand(2, 4, 4)
    lengths = torch.tensor([[9, 4], [0, 7]])
    raw = score_keys(k_pool, tables, lengths, u, e)
    for row in range(2):
        for head in range(4):
            length = lengths[row, head // 2].expand(2)
            alone = score_keys(k_pool, tables, length, u, e)
            assert torch.equal(raw[row, head], alone[row, head])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scores_of_a_narrow_pool_are_those_of_its_rounded_keys(paged, dtype):
    """Oracle: float64 on the rounded keys; the tolerance is relative to the scores' deviation."""
    lengths = torch.tensor([60, 33])
    k_pool, _, _, tables = paged.make_cache([60, 33], width=32, dtype=dtype)
    u, e = torch.randn(2, 4, 32), torch.rand(2, 4, 16)
    raw = score_keys(k_pool, tables, lengths, u, e)
    exact = score_keys(k_pool.double(), tables, lengths, u, e)
    assert raw.dtype == torch.float32
    finite = exact.isfinite()
    assert torch.equal(raw.isfinite(), finite)
    assert float((raw - exact)[finite].abs().max()) < 1e-4 * float(exact[finite].std())


def test_gather_pages_reads_slots_through_the_table(paged):
    """Oracle: one slot at a time; padding reads some page, so that nothing is out of bounds."""
    _, _, pos_pool, tables = paged.make_cache([9, 3])
    dense = gather_pages(pos_pool, tables)
    assert dense.shape == (2, 2, tables.shape[1] * 4)
    for row, length in enumerate([9, 3]):
        for head in range(2):
            for slot in range(length):
                expected = paged.slot_of(pos_pool, tables, row, head, slot)
                assert dense[row, head, slot] == expected


PROGRAM = """
    # (dtype, width, bands, KV heads, group, block size, lengths): ragged tails, padded bands,
    # unrotated components, a tile over several pages, 26 programs in all
    cases = [
        (torch.float32, 12, 6, 2, 2, 16, [80, 37, 64, 1]),
        (torch.bfloat16, 8, 4, 1, 4, 4, [70, 0]),
        (torch.float16, 16, 8, 2, 1, 128, [130]),
        (torch.bfloat16, 12, 4, 2, 1, 16, [40]),
        (torch.float32, 8, 0, 1, 1, 16, [20]),
    ]
    for index, (dtype, width, bands, kv_heads, group, block_size, lengths) in enumerate(cases):
        tables, blocks = tables_of(lengths, block_size, spare=2)
        pool = torch.randn(blocks, kv_heads, block_size, width).to(dtype)
        length = torch.tensor(lengths)
        if index == 3:
            length = length[:, None] - torch.tensor([0, 7])
        rows = len(lengths)
        u = torch.randn(rows, kv_heads * group, width)
        e = torch.rand(kv_heads * group, width - bands).expand(rows, -1, -1)
        shape = dict(bands=bands, interleaved=index % 2 == 1)
        got = kernels.score_keys(pool, tables, length, u, e, backend="triton", **shape)
        want = kernels.score_keys(pool.double(), tables, length, u.double(), e.double(), **shape)
        assert gap(got, want) < 1e-5, (dtype, lengths)
    try:
        kernels.score_keys(pool, tables + 1000, length, u, e, backend="triton", **shape)
    except ShapeError:
        pass
    else:
        raise AssertionError("a page outside the pool was read")
"""


@pytest.mark.slow
def test_triton_scores_agree_under_the_interpreter(interpreted):
    """Oracle: the float64 torch reference on the same (rounded) keys."""
    interpreted(PROGRAM)
