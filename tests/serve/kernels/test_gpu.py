"""Every kernel on a GPU against its float64 torch reference on the same (rounded) content."""

import math

import pytest
import torch

from serve.kernels import compact_kv, paged_decode, rope_write, score_keys, select_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

KV_HEADS, BLOCK_SIZE = 4, 16
LENGTHS = [2176, 1999, 300, 37, 1, 0]
SINGLE = 1e-4  # float32 sums of 128 products; relative to scores' deviation, or of size one
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of an output of size one: the weights of the products with values are rounded to the pool's dtype.
ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: SINGLE}


def make_cache(width, dtype, lengths=LENGTHS, device="cuda"):
    """Pools with shuffled pages; what no sequence fills is NaN."""
    pages = max(-(-max(lengths) // BLOCK_SIZE), 1)
    rows = len(lengths)
    tables = torch.randperm(rows * pages + 3, device=device)[: rows * pages].view(rows, pages)
    length_R = torch.tensor(lengths, device=device)
    shape = (rows * pages + 3, KV_HEADS, BLOCK_SIZE)
    pools = [torch.randn(*shape, width, device=device).to(dtype) for _ in range(2)]
    pos_pool = torch.randint(0, 3000, shape, device=device, dtype=torch.int32)
    slot = torch.arange(pages * BLOCK_SIZE, device=device).view(pages, BLOCK_SIZE)
    is_stale = (slot >= length_R[:, None, None])[:, :, None].expand(-1, -1, KV_HEADS, -1)
    for pool in pools:
        pool[tables] = pool[tables].masked_fill(is_stale[..., None], math.nan)
    return *pools, pos_pool, tables, length_R


def gap(got, want):
    """Return the largest difference; infinite where only one of the two is finite."""
    if not torch.equal(got.isfinite(), want.isfinite()):
        return math.inf
    return float((got.double() - want.double())[want.isfinite()].abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(
    ("width", "bands", "interleaved"), [(128, 64, False), (64, 32, True), (80, 16, False)]
)
def test_scores_agree(dtype, group, width, bands, interleaved):
    """Oracle: the float64 torch reference."""
    k_pool, _, _, tables, lengths = make_cache(width, dtype)
    rows = len(LENGTHS)
    u = torch.randn(rows, KV_HEADS * group, width, device="cuda")
    e = torch.rand(rows, KV_HEADS * group, width - bands, device="cuda")
    shape = {"bands": bands, "interleaved": interleaved}
    got = score_keys(k_pool, tables, lengths, u, e, backend="triton", **shape)
    want = score_keys(k_pool.double(), tables, lengths, u, e, **shape)
    assert gap(got, want) < SINGLE * float(want[want.isfinite()].std())


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "ties"])
@pytest.mark.parametrize(("slots", "budget"), [(2176, 2048), (33000, 2048), (50, 50), (7, 1)])
def test_selections_agree(levels, slots, budget):
    """Oracle: the torch reference on the CPU, exactly."""
    shape = (3, KV_HEADS, slots)
    scores = torch.randn(shape) if levels is None else torch.randint(levels, shape) - 2.0
    positions = torch.rand(shape).argsort(-1)
    scores[positions < 2] = math.inf
    scores[..., slots - 2 :], positions[..., slots - 2 :] = -math.inf, -1
    got = select_slots(scores.cuda(), positions.cuda(), budget, backend="triton")
    assert torch.equal(got.cpu(), select_slots(scores, positions, budget))


@pytest.mark.parametrize("copied", [False, True], ids=["in-place", "copied"])
@pytest.mark.parametrize("kept", [2048, 100])
def test_moves_agree(copied, kept):
    """Oracle: the torch reference on the CPU, exactly, on whole pools."""
    lengths = [2176, 2176, 2176]
    *pools, tables, _ = make_cache(128, torch.bfloat16, lengths)
    slots = tables.shape[1] * BLOCK_SIZE
    keep = torch.rand(3, KV_HEADS, slots, device="cuda").argsort(-1)[..., :kept].sort(-1).values
    dst = tables[:, : -(-kept // BLOCK_SIZE)].clone()
    if copied:
        used = set(tables.flatten().tolist())
        dst[0, 0] = next(page for page in range(len(pools[0])) if page not in used)
    want = [pool.cpu() for pool in pools]
    compact_kv(want, tables.cpu(), keep.cpu(), dst.cpu())
    compact_kv(pools, tables, keep, dst, backend="triton")
    for pool, other in zip(pools, want, strict=True):
        assert torch.equal(pool.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("width", [64, 128, 80])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-window-heads"])
def test_attention_agrees(dtype, group, width, extras):
    """Oracle: the float64 torch reference; the log-sum-exp is float32 throughout."""
    k_pool, v_pool, pos_pool, tables, lengths = make_cache(width, dtype)
    rows, heads = len(LENGTHS), KV_HEADS * group
    q = torch.randn(rows, heads, width, device="cuda").to(dtype)
    where, bias, window = torch.full((rows,), 3000, device="cuda"), None, None
    if extras:
        less = torch.arange(KV_HEADS, device="cuda") * 3
        lengths = (lengths[:, None] - less).clamp(min=0)
        bias, window = torch.randn(heads, 3001, device="cuda"), 2000
    rest = (pos_pool, tables, lengths, where, width**-0.5, bias)
    o, lse = paged_decode(q, k_pool, v_pool, *rest, window=window, backend="triton")
    doubles = (x.double() for x in (q, k_pool, v_pool))
    want_o, want_lse = paged_decode(*doubles, *rest, window=window)
    assert o.dtype == dtype
    assert gap(lse, want_lse) < SINGLE
    assert gap(o, want_o) < ROUNDING[dtype]


def test_attention_agrees_with_every_number_of_splits():
    """Oracle: the float64 torch reference; the splits follow from rows and table width."""
    for rows in (1, 2, 40, 400):
        lengths = [5000 // (row + 1) for row in range(rows)]
        k_pool, v_pool, pos_pool, tables, length_R = make_cache(64, torch.bfloat16, lengths)
        q = torch.randn(rows, KV_HEADS, 64, device="cuda").bfloat16()
        rest = (pos_pool, tables, length_R, length_R, 0.125)
        o, lse = paged_decode(q, k_pool, v_pool, *rest, backend="triton")
        want_o, want_lse = paged_decode(q.double(), k_pool.double(), v_pool.double(), *rest)
        assert gap(lse, want_lse) < SINGLE
        assert gap(o, want_o) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("bands", [None, 16, 64])
def test_writes_agree(dtype, interleaved, bands):
    """Oracle: the torch reference; values and positions exactly, rotations to one rounding."""
    k_pool, v_pool, pos_pool, tables, _ = make_cache(128, dtype, [2176])
    tokens, heads, slots = 500, 4 * KV_HEADS, tables.shape[1] * BLOCK_SIZE
    qkv = torch.randn(tokens, heads + 2 * KV_HEADS, 128, device="cuda").to(dtype)
    q, k, v = qkv.split([heads, KV_HEADS, KV_HEADS], dim=1)
    cos = sin = None
    if bands is not None:
        angle = 100 * torch.rand(tokens, bands, device="cuda")
        cos, sin = angle.cos(), angle.sin()
    places = torch.randperm(slots, device="cuda")[:tokens]
    places[::7] = -1
    results = []
    for backend in ("torch", "triton"):
        pools = [pool.clone() for pool in (k_pool, v_pool, pos_pool)]
        arguments = (cos, sin, *pools, torch.arange(tokens, device="cuda"), places)
        out = rope_write(q, k, v, *arguments, interleaved=interleaved, backend=backend)
        results.append((out, *pools))
    (want_q, want_k, want_v, want_pos), (got_q, got_k, got_v, got_pos) = results
    assert gap(got_q, want_q) < ROUNDING[dtype] * 8
    assert gap(got_k, want_k) < ROUNDING[dtype] * 8
    assert torch.equal(got_v.nan_to_num(), want_v.nan_to_num())
    assert torch.equal(got_pos, want_pos)


def test_auto_takes_triton_except_for_doubles():
    """Oracle: float64 scores come from torch, in float64."""
    k_pool, _, _, tables, lengths = make_cache(64, torch.float32)
    u, e = (torch.rand(len(LENGTHS), KV_HEADS, n, device="cuda") for n in (64, 32))
    assert score_keys(k_pool, tables, lengths, u, e).dtype == torch.float32
    assert score_keys(k_pool.double(), tables, lengths, u, e).dtype == torch.float64
