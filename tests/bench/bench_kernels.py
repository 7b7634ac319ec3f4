"""Kernels on a GPU: the fraction of the copy bandwidth, measured in the same run, they achieve.

Shapes are one layer of an 8B model with grouped queries (32 query heads, 8 key/value heads, width
128, bf16), 2,176 slots per row, and for score and compaction several layers in one launch.
"""

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve.kernels import compact_kv, paged_decode, rope_write, score_keys, select_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

FRACTION = 0.7  # of the copy bandwidth, for kernels that are bound by memory
HEADS, KV_HEADS, WIDTH, BLOCK_SIZE = 32, 8, 128, 16
BUDGET, INTERVAL = 2048, 128
SLOTS = BUDGET + INTERVAL
BATCHES = (1, 16, 64)
LAYERS = 8  # in rotation, so that nothing stays in the level-2 cache; and per launch
CALLS = 20  # between two readings of the clock


def seconds(call: Callable[[int], Any]) -> float:
    """Return the device's seconds per call, calls numbered from 0, after a warm-up."""
    for index in range(3):
        call(index)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for index in range(CALLS):
        call(index)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


@pytest.fixture(scope="module")
def copy_rate() -> Callable[[], float]:
    """Return a function that measures a large copy: bytes read and written per second."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: 2 * source.numel() / seconds(lambda _: target.copy_(source))


def cache(rows: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return keys, values and positions of ``rows`` full rows, and shuffled tables."""
    pages = SLOTS // BLOCK_SIZE
    shape = (rows * pages, KV_HEADS, BLOCK_SIZE)
    pools = [torch.randn(*shape, WIDTH, device="cuda").bfloat16() for _ in range(2)]
    pools.append(torch.zeros(shape, dtype=torch.int32, device="cuda"))
    return pools, torch.randperm(rows * pages, device="cuda").view(rows, pages)


def report(
    bench: Any, copy_rate: Callable, name: str, call: Callable, num_bytes: int, **sizes: int
) -> None:
    """Add the time of a call and the fraction of the copy bandwidth it amounts to."""
    measured, fractions = [], []
    for _ in range(bench.rounds):
        measured.append(seconds(call))
        fractions.append(num_bytes / measured[-1] / copy_rate())
    sizes |= {"bytes": num_bytes}
    bench.add(f"kernel: {name}", [1e6 * s for s in measured], "us", **sizes)
    # At batch 1 the launch takes longer than the data.
    least = FRACTION if sizes["batch"] >= 16 and num_bytes > 2**24 else None
    bench.add(f"kernel: {name}, of copy bandwidth", fractions, "ratio", least=least, **sizes)
    assert statistics.median(fractions) > 0


@pytest.mark.parametrize("batch", BATCHES)
def test_decode(bench: Any, copy_rate: Callable, batch: int) -> None:
    """One layer's attention step over full caches."""
    pools, tables = cache(batch * LAYERS)
    by_layer = tables.view(LAYERS, batch, -1)
    q = torch.randn(batch, HEADS, WIDTH, device="cuda").bfloat16()
    lengths = torch.full((batch,), SLOTS, device="cuda")

    def call(index: int) -> None:
        rest = (by_layer[index % LAYERS], lengths, lengths, WIDTH**-0.5)
        paged_decode(q, *pools, *rest, backend="triton")

    num_bytes = batch * SLOTS * KV_HEADS * WIDTH * 2 * 2
    report(bench, copy_rate, f"decode, batch {batch}", call, num_bytes, batch=batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_score(bench: Any, copy_rate: Callable, batch: int) -> None:
    """Scores of several layers in one launch."""
    rows = batch * LAYERS
    (k_pool, _, _), tables = cache(rows)
    u = torch.randn(rows, HEADS, WIDTH, device="cuda")
    e = torch.rand(rows, HEADS, WIDTH // 2, device="cuda")
    lengths = torch.full((rows,), SLOTS, device="cuda")

    def call(_: int) -> None:
        score_keys(k_pool, tables, lengths, u, e, backend="triton")

    num_bytes = rows * SLOTS * (KV_HEADS * WIDTH * 2 + HEADS * 4)
    report(bench, copy_rate, f"score, batch {batch}", call, num_bytes, batch=batch, layers=LAYERS)


@pytest.mark.parametrize("batch", BATCHES)
def test_compact(bench: Any, copy_rate: Callable, batch: int) -> None:
    """The steady state: as many slots move as the interval has."""
    rows = batch * LAYERS
    pools, tables = cache(rows)
    hole = torch.rand(rows, KV_HEADS, BUDGET, device="cuda").argsort(-1)[..., INTERVAL:]
    movers = torch.arange(BUDGET, SLOTS, device="cuda").expand(rows, KV_HEADS, INTERVAL)
    keep = torch.cat((hole.sort(-1).values, movers), dim=-1)

    def call(_: int) -> None:
        compact_kv(pools, tables, keep, tables, backend="triton")

    num_bytes = 2 * rows * KV_HEADS * INTERVAL * (2 * WIDTH * 2 + 4)
    name = f"compact, batch {batch}"
    report(bench, copy_rate, name, call, num_bytes, batch=batch, layers=LAYERS)


@pytest.mark.parametrize("batch", BATCHES)
def test_select(bench: Any, copy_rate: Callable, batch: int) -> None:
    """Selection of several layers in one launch; bound by latency, so without a budget."""
    rows = batch * LAYERS
    scores = torch.randn(rows, KV_HEADS, SLOTS, device="cuda")
    positions = torch.arange(SLOTS, device="cuda").int().expand(rows, KV_HEADS, -1).contiguous()

    def call(_: int) -> None:
        select_slots(scores, positions, BUDGET, backend="triton")

    bench.add(f"kernel: select, batch {batch}", [1e6 * seconds(call)], "us", batch=batch)


@pytest.mark.parametrize("batch", BATCHES)
def test_write(bench: Any, copy_rate: Callable, batch: int) -> None:
    """Rotation and cache write of one layer's decode step; bound by the launch."""
    pools, _ = cache(batch)
    q = torch.randn(batch, HEADS, WIDTH, device="cuda").bfloat16()
    k = torch.randn(batch, KV_HEADS, WIDTH, device="cuda").bfloat16()
    turn = torch.rand(batch, WIDTH // 2, device="cuda")
    places = torch.arange(batch, device="cuda") * SLOTS

    def call(_: int) -> None:
        rope_write(q, k, k, turn, turn, *pools, places, places, backend="triton")

    bench.add(f"kernel: write, batch {batch}", [1e6 * seconds(call)], "us", batch=batch)
