"""Scheduling against its rules, simulated without a model and without torch."""

import random
import subprocess
import sys

import pytest

from common.errors import ConfigError, DataError
from serve.engine.blocks import BlockManager
from serve.engine.request import Item, Request, SamplingParams, Sequence, State
from serve.engine.scheduler import Compaction, EngineConfig, Scheduler

BLOCK_SIZE = 4


def make_sequence(name: str, prompt: int, new: int, *, compress: bool = True) -> Sequence:
    """Return a waiting sequence of ``prompt`` tokens that wants ``new`` more."""
    params = SamplingParams(max_tokens=new)
    request = Request(
        request_id=name,
        prompt=tuple(range(prompt)),
        params=params,
        seed=0,
        max_total=prompt + new,
        compress=compress,
    )
    return Sequence.start(request)


def make_scheduler(
    num_blocks: int, compaction: Compaction | None = None, **settings: object
) -> Scheduler:
    """Return a scheduler over an empty pool."""
    config = EngineConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, **settings)
    return Scheduler(config, BlockManager(num_blocks, BLOCK_SIZE), compaction)


def commit(scheduler: Scheduler, items: list[Item]) -> list[tuple[str, int]]:
    """Do what the engine does after a forward pass; return (request, length) of compactions."""
    done = []
    for item in items:
        sequence = item.sequence
        assert len(sequence.block_table) * BLOCK_SIZE >= sequence.kv_len + item.count
        sequence.advance(item.count)
        if sequence.remaining == 0:
            sequence.append(7)
            if sequence.finish_reason:
                scheduler.finish(sequence)
    for sequence in scheduler.due(items):
        done.append((sequence.request.request_id, sequence.num_tokens))
        assert scheduler.compaction is not None
        budget = scheduler.compaction.budget
        plan = scheduler.blocks.plan_compaction(sequence.block_table, budget)
        scheduler.compacted(sequence, plan)
    scheduler.blocks.check(s.block_table for s in scheduler.sequences)
    return done


def drain(scheduler: Scheduler, limit: int = 5000) -> list[tuple[str, int]]:
    """Run to the end; every step must do something."""
    compactions = []
    for _ in range(limit):
        if not scheduler.has_work:
            return compactions
        items = scheduler.schedule()
        assert items, "a step without work while requests wait"
        compactions += commit(scheduler, items)
    raise AssertionError("requests did not finish")


def test_schedule_puts_decodes_before_chunks_within_the_budget() -> None:
    """Oracle: the stated order, worked out by hand."""
    scheduler = make_scheduler(64, max_num_batched_tokens=16)
    first, second = make_sequence("a", 5, 4), make_sequence("b", 40, 4)
    scheduler.add(first)
    scheduler.add(second)
    items = scheduler.schedule()
    assert [(i.sequence, i.count) for i in items] == [(first, 5), (second, 11)]
    commit(scheduler, items)
    items = scheduler.schedule()
    assert [(i.sequence, i.count) for i in items] == [(first, 1), (second, 15)]


def test_schedule_never_lets_a_request_overtake() -> None:
    """Oracle: FIFO; a small request behind one that does not fit has to wait."""
    scheduler = make_scheduler(8)
    running, large, small = (
        make_sequence("running", 20, 2),
        make_sequence("large", 28, 2),
        make_sequence("small", 2, 2),
    )
    for sequence in (running, large, small):
        scheduler.add(sequence)
    scheduler.schedule()
    assert running.state is State.RUNNING
    assert large.state is State.WAITING
    assert small.state is State.WAITING


def test_schedule_preempts_the_newest_and_recomputes_it() -> None:
    """Oracle: two requests that fit alone but not together; the older one is never disturbed."""
    scheduler = make_scheduler(6)
    old, new = make_sequence("old", 8, 12), make_sequence("new", 8, 12)
    scheduler.add(old)
    scheduler.add(new)
    drain(scheduler)
    assert old.preemptions == 0
    assert new.preemptions >= 1
    assert len(old.output) == len(new.output) == 12
    assert scheduler.blocks.num_free == 6


def test_add_rejects_what_never_fits() -> None:
    """Oracle: the documented one-line error instead of a wait without end."""
    scheduler = make_scheduler(4)
    scheduler.add(make_sequence("fits", 8, 9))
    with pytest.raises(DataError, match=r"5 cache blocks.*pool has 4") as caught:
        scheduler.add(make_sequence("large", 8, 10))
    assert "\n" not in str(caught.value)


def test_add_counts_a_compressed_request_at_its_bounded_peak() -> None:
    """Oracle: budget + interval slots, however many tokens are generated."""
    compaction = Compaction(budget=8, interval=4)
    scheduler = make_scheduler(3, compaction)
    sequence = make_sequence("long", 4, 200)
    scheduler.add(sequence)
    compactions = drain(scheduler)
    assert sequence.preemptions == 0
    assert [length for _, length in compactions] == list(range(12, 203, 4))
    with pytest.raises(DataError, match="cache blocks"):
        scheduler.add(make_sequence("opted out", 4, 200, compress=False))


def test_schedule_random_loads_finish_and_compact_at_fixed_lengths() -> None:
    """Oracle: compaction lengths of a solo run; pool, batch and chunk size may not matter."""
    rng = random.Random(5)
    for _ in range(60):
        compaction = Compaction(budget=rng.choice((4, 8, 10)), interval=rng.choice((3, 4, 8)))
        shapes = [(rng.randrange(1, 40), rng.randrange(1, 30)) for _ in range(12)]
        settings = {
            "max_num_seqs": rng.choice((1, 3, 8)),
            "max_num_batched_tokens": rng.choice((8, 9, 64)),
            "deterministic": rng.random() < 0.3,
        }
        scheduler = make_scheduler(rng.choice((20, 30, 200)), compaction, **settings)
        expected = []
        for index, (prompt, new) in enumerate(shapes):
            scheduler.add(make_sequence(str(index), prompt, new, compress=index % 3 > 0))
            solo = make_scheduler(200, compaction)
            solo.add(make_sequence(str(index), prompt, new, compress=index % 3 > 0))
            expected += drain(solo)
        assert sorted(drain(scheduler)) == sorted(expected)
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_deterministic_chunks_depend_on_the_prompt_alone() -> None:
    """Oracle: multiples of the token budget, whatever else runs."""
    scheduler = make_scheduler(100, max_num_batched_tokens=8, max_num_seqs=8, deterministic=True)
    sequences = [make_sequence(str(i), n, 5) for i, n in enumerate((3, 20, 9, 17))]
    for sequence in sequences:
        scheduler.add(sequence)
    counts: dict[str, list[int]] = {str(i): [] for i in range(4)}
    while scheduler.has_work:
        items = scheduler.schedule()
        for item in items:
            if item.sequence.num_tokens < len(item.sequence.request.prompt):
                counts[item.sequence.request.request_id].append(item.count)
        commit(scheduler, items)
    assert counts == {"0": [3], "1": [8, 8, 4], "2": [8, 1], "3": [8, 8, 1]}


def test_finish_releases_waiting_and_running_requests() -> None:
    """Oracle: an empty pool after aborting everything in any state."""
    scheduler = make_scheduler(8)
    sequences = [make_sequence(str(i), 16, 4) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.schedule()
    for sequence in reversed(sequences):
        scheduler.finish(sequence)
    assert not scheduler.has_work
    assert scheduler.blocks.num_free == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 12},
        {"block_size": 512},
        {"num_blocks": 0},
        {"max_num_seqs": 0},
        {"max_num_seqs": 32, "max_num_batched_tokens": 16},
        {"backend": "cuda"},
        {"dtype": "int8"},
    ],
)
def test_engine_config_rejects(settings: dict) -> None:
    """Oracle: the documented error, one line."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": 2.5},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": ("",)},
        {"stop": ("x" * 257,)},
        {"stop": tuple("abcdefghijklmnopq")},
        {"stop_token_ids": (-1,)},
        {"logprobs": 21},
    ],
)
def test_sampling_params_reject(settings: dict) -> None:
    """Oracle: the documented ranges."""
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**settings)
    assert "\n" not in str(caught.value)


def test_scheduling_needs_no_torch() -> None:
    """Oracle: the modules of a fresh interpreter."""
    code = (
        "import sys, serve, serve.engine.scheduler, serve.engine.blocks, serve.engine.request;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
