"""Scheduling against its rules, simulated without a model and without torch."""

import random
import subprocess
import sys

import pytest

from common.errors import ConfigError, DataError
from serve.engine.blocks import BlockManager
from serve.engine.config import EngineConfig
from serve.engine.request import Compaction, Item, Request, Sequence, State
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduler

BLOCK_SIZE = 4


def make_sequence(
    name: str,
    prompt: int | tuple[int, ...],
    new: int,
    compaction: Compaction | None = None,
    **fields: object,
) -> Sequence:
    """Return a waiting sequence of a prompt, given by tokens or by length, that wants more."""
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else prompt
    total = len(tokens) + new
    request = Request(
        request_id=name,
        prompt=tokens,
        params=SamplingParams(max_tokens=new),
        seed=0,
        max_total=total,
        compaction=compaction if compaction and total - 1 > compaction.trigger else None,
        **fields,
    )
    return Sequence.start(request)


def make_scheduler(num_blocks: int, **settings: object) -> Scheduler:
    """Return a scheduler over an empty pool; without the prefix cache unless asked for."""
    settings = {"prefix_caching": False} | settings
    config = EngineConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, **settings)
    return Scheduler(config, BlockManager(num_blocks, BLOCK_SIZE))


def commit(scheduler: Scheduler, items: list[Item]) -> list[tuple[str, int]]:
    """Do what the engine does after a forward pass; return (request, length) of compactions."""
    done = []
    blocks = scheduler.blocks
    for item in items:
        sequence = item.sequence
        slots = range(sequence.kv_len, sequence.kv_len + item.count)
        assert all(blocks.is_writable(sequence.block_table[s // BLOCK_SIZE]) for s in slots)
    scheduler.advance(items)
    for sequence in [item.sequence for item in items]:
        if sequence.remaining == 0:
            sequence.append(7)
            if sequence.finish_reason:
                scheduler.finish(sequence)
    for sequence in scheduler.due(items):
        done.append((sequence.request.request_id, sequence.num_tokens))
        budget = sequence.request.compaction.budget
        plan = blocks.plan_compaction(sequence.block_table, budget)
        scheduler.compacted(sequence, plan)
    blocks.check(s.block_table for s in scheduler.sequences)
    reserved = sum(s.reserved for s in scheduler.running)
    assert reserved + blocks.num_optimistic <= blocks.num_blocks
    return done


def drain(scheduler: Scheduler, limit: int = 5000) -> list[tuple[str, int]]:
    """Run to the end; every step must do something."""
    compactions = []
    for _ in range(limit):
        if not scheduler.has_work:
            assert not scheduler.held
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
    scheduler = make_scheduler(3)
    sequence = make_sequence("long", 4, 200, compaction)
    scheduler.add(sequence)
    compactions = drain(scheduler)
    assert sequence.preemptions == 0
    assert [length for _, length in compactions] == list(range(12, 203, 4))
    with pytest.raises(DataError, match="cache blocks"):
        scheduler.add(make_sequence("opted out", 4, 200))


def test_a_prompt_beyond_the_pool_needs_compaction_inside_it() -> None:
    """Oracle: the documented remedy; compactions at budget + k intervals, prompt or not."""
    scheduler = make_scheduler(4, max_num_batched_tokens=64)
    with pytest.raises(DataError, match=r"26 cache blocks.*compress_prefill"):
        scheduler.add(make_sequence("whole", 103, 9, Compaction(budget=8, interval=5)))
    sequence = make_sequence("cut", 103, 9, Compaction(budget=8, interval=5, in_prompt=True))
    scheduler.add(sequence)
    compactions = drain(scheduler)
    assert [length for _, length in compactions] == list(range(13, 111, 5))
    assert sequence.finish_reason == "length"
    assert scheduler.blocks.num_free == 4


def make_load(rng: random.Random, in_prompt: bool, count: int) -> list[tuple]:
    """Return random requests, many of which begin alike."""
    kinds = [
        Compaction(budget=rng.choice((4, 8, 10)), interval=rng.choice((3, 4, 8)), in_prompt=flag)
        for flag in (in_prompt, in_prompt)
    ]
    load = []
    for index in range(count):
        length = rng.randrange(1, 40)
        common = rng.randrange(length + 1)
        prompt = (*range(common), *(rng.randrange(9) for _ in range(length - common)))
        compaction = (None, *kinds)[index % 3]
        load.append((str(index), prompt, rng.randrange(1, 30), compaction))
    return load


@pytest.mark.parametrize("in_prompt", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_schedule_random_loads_finish_and_compact_at_fixed_lengths(
    prefix_caching: bool, in_prompt: bool
) -> None:
    """Oracle (R5, R6): compaction lengths of solo runs; pools too small for everything at once."""
    rng = random.Random(5)
    preemptions = hits = 0
    for _ in range(25):
        load = make_load(rng, in_prompt, 12)
        scheduler = make_scheduler(
            rng.choice((20, 30, 200)),
            max_num_seqs=rng.choice((1, 3, 8)),
            max_num_batched_tokens=rng.choice((8, 9, 64)),
            deterministic=rng.random() < 0.3,
            prefix_caching=prefix_caching,
        )
        expected = []
        for index, row in enumerate(load):
            sequence = make_sequence(*row)
            scheduler.add(sequence)
            if index % 4 == 1:
                scheduler.add(make_sequence(*row), leader=sequence)
            solo = make_scheduler(200)
            solo.add(make_sequence(*row))
            expected += drain(solo) * (1 + (index % 4 == 1))
        assert sorted(drain(scheduler)) == sorted(expected)
        assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
        preemptions += scheduler.stats.preemptions
        hits += scheduler.stats.prefix_hits
    assert preemptions > 0
    assert (hits > 0) == prefix_caching


def test_a_prefix_hit_leaves_the_last_token_and_respects_the_limits() -> None:
    """Oracle: full blocks below the smallest limit, by hand; salts keep requests apart."""
    cases = [
        (16, {}, 12),
        (17, {}, 16),
        (40, {"prefix_limit": 11}, 8),
        (40, {"prefix_limit": 0}, 0),
        (40, {"cache_salt": "other"}, 0),
        (40, {"compaction": Compaction(budget=8, interval=4)}, 36),
        (40, {"compaction": Compaction(budget=8, interval=4, in_prompt=True)}, 8),
        (40, {"compaction": Compaction(budget=9, interval=4, in_prompt=True)}, 12),
    ]
    scheduler = make_scheduler(200, prefix_caching=True)
    scheduler.add(make_sequence("first", 64, 1))
    drain(scheduler)
    for length, options, hit in cases:
        sequence = make_sequence("later", length, 20, **options)
        scheduler.add(sequence)
        items = scheduler.schedule()
        assert sequence.num_hit == hit
        assert items[0].count + hit == length or "compaction" in options
        scheduler.finish(sequence)


def test_deterministic_hits_keep_the_chunk_boundaries() -> None:
    """Oracle: hits in multiples of the chunk; nothing of a shorter chunk or of decoding is kept."""
    scheduler = make_scheduler(
        200, prefix_caching=True, deterministic=True, max_num_batched_tokens=24
    )
    scheduler.add(make_sequence("first", 60, 20))
    drain(scheduler)
    for length, hit in ((24, 0), (25, 24), (50, 48), (79, 48)):
        sequence = make_sequence("later", length, 1)
        scheduler.add(sequence)
        scheduler.schedule()
        assert sequence.num_hit == hit
        scheduler.finish(sequence, in_doubt=False)


def test_followers_wait_for_the_prompt_and_share_its_blocks() -> None:
    """Oracle: three sequences in the space of one prompt plus their own last blocks."""
    scheduler = make_scheduler(20, prefix_caching=True, max_num_batched_tokens=16)
    leader, later = make_sequence("a", 40, 4), make_sequence("b", 3, 4)
    followers = [make_sequence("a", 40, 4) for _ in range(2)]
    scheduler.add(leader)
    for follower in followers:
        scheduler.add(follower, leader=leader)
    scheduler.add(later)
    assert [s.state for s in followers] == [State.HELD] * 2
    for _ in range(3):
        commit(scheduler, scheduler.schedule())
    assert list(scheduler.waiting) == followers
    commit(scheduler, scheduler.schedule())
    assert [s.num_hit for s in followers] == [36, 36]
    leaders, each_followers, laters = 2, 1, 1
    used = scheduler.blocks.num_blocks - scheduler.blocks.num_free
    assert used == 9 + leaders + 2 * each_followers + laters
    drain(scheduler)
    assert scheduler.blocks.num_free == 20


@pytest.mark.parametrize("steps", [0, 1])
def test_followers_survive_the_end_of_their_leader(steps: int) -> None:
    """Oracle: they run by themselves when the prompt they wait for is aborted."""
    scheduler = make_scheduler(20, prefix_caching=True, max_num_batched_tokens=16)
    leader, *followers = (make_sequence("a", 40, 4) for _ in range(3))
    scheduler.add(leader)
    for follower in followers:
        scheduler.add(follower, leader=leader)
    for _ in range(steps):
        commit(scheduler, scheduler.schedule())
    scheduler.finish(followers[1])
    scheduler.finish(leader)
    drain(scheduler)
    assert followers[0].finish_reason == "length"
    assert scheduler.blocks.num_free == 20


def test_sharers_of_a_full_pool_compact_one_after_another() -> None:
    """Oracle (R6): both reserve their shared blocks; each compaction finds its fresh ones."""
    compaction = Compaction(budget=16, interval=4)
    scheduler = make_scheduler(10, prefix_caching=True, max_num_batched_tokens=64)
    first, second = (make_sequence("s", 17, 30, compaction) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second, leader=first)
    compactions = drain(scheduler)
    assert second.num_hit == 16
    assert sorted(length for _, length in compactions) == sorted(list(range(20, 46, 4)) * 2)
    assert scheduler.blocks.num_free == 10


def test_content_in_doubt_is_not_found_again() -> None:
    """Oracle: no hit after an error, a hit after a clean end."""
    scheduler = make_scheduler(40, prefix_caching=True)
    for in_doubt, hit in ((True, 0), (False, 0), (False, 28)):
        sequence = make_sequence("x", 32, 4)
        scheduler.add(sequence)
        commit(scheduler, scheduler.schedule())
        assert sequence.num_hit == hit
        scheduler.finish(sequence, in_doubt=in_doubt)


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


def test_scheduling_needs_no_torch() -> None:
    """Oracle: the modules of a fresh interpreter."""
    code = (
        "import sys, serve, serve.engine.scheduler, serve.engine.blocks, serve.engine.request,"
        " serve.engine.stats;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
