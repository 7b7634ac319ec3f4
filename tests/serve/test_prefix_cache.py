"""Prompts out of the prefix cache against prompts computed afresh, compression on and off."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams
from serve.kv import POLICIES, Policy

# Random weights tell nothing about which keys matter, but policies disagree on them.
NAMES = ("full", "knorm", "snapkv", "h2o", "random")
SHAPE = {"interval": 6, "sinks": 2, "window": 4}


def make_policy(name: str, **options: object) -> Policy:
    """Return a policy that compacts often."""
    return POLICIES["full"]() if name == "full" else POLICIES[name](budget=16, **SHAPE, **options)


def make_family(tiny: SimpleNamespace, seed: int) -> list[list[int]]:
    """Return prompts that begin alike, to various lengths, and one of its own."""
    (stem,) = tiny.make_prompts([60], seed=seed)
    tails = tiny.make_prompts([1, 9, 4, 20], seed=seed + 1)
    return [
        stem,
        stem[:41] + tails[0],
        stem[:17],
        stem[:40] + tails[1],
        stem,
        tails[3],
        stem[:8] + tails[2],
    ]


def serve(
    model: torch.nn.Module, prompts: list, params: list, policy: Policy, **settings: object
) -> tuple[list[list[int]], EngineCore]:
    """Return the tokens of all prompts, arriving one step after another, and the engine."""
    core = EngineCore(model, EngineConfig(debug=True, block_size=8, **settings), policy)
    live = []
    for prompt, one in zip(prompts, params, strict=True):
        live.append(core.add(prompt, one))
        core.step()
    while core.has_work:
        core.step()
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks
    return [sequence.output for sequence in live], core


@pytest.mark.parametrize("compress_prefill", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_without_the_cache(
    tiny: SimpleNamespace, name: str, compress_prefill: bool
) -> None:
    """Oracle O5: solo runs without prefix cache, float64; the pool is too small for comfort."""
    policy = make_policy(name, compress_prefill=compress_prefill)
    prompts = make_family(tiny, 5)
    params = [SamplingParams(seed=i, max_tokens=14 + i) for i in range(len(prompts))]
    alone = [
        tiny.run_alone(tiny.model, p, q, policy, prefix_caching=False).output
        for p, q in zip(prompts, params, strict=True)
    ]
    got, core = serve(
        tiny.model,
        prompts,
        params,
        policy,
        num_blocks=14,
        max_num_seqs=4,
        max_num_batched_tokens=12,
    )
    assert got == alone
    assert (core.counters.prefix_hits == 0) == (name == "h2o")
    assert (core.counters.compactions == 0) == (name == "full")


def test_a_second_turn_finds_prompt_and_answer(tiny: SimpleNamespace) -> None:
    """Oracle: a solo run without the cache; generated blocks are found like those of prompts."""
    (prompt,) = tiny.make_prompts([21])
    params = SamplingParams(seed=1, max_tokens=20)
    core = EngineCore(tiny.model, EngineConfig(block_size=8, debug=True))
    first = core.add(prompt, params)
    while core.has_work:
        core.step()
    turn = prompt + first.output + [3, 1, 4]
    second = core.add(turn, params)
    while core.has_work:
        core.step()
    assert second.num_hit == 40
    assert second.output == tiny.run_alone(tiny.model, turn, params, prefix_caching=False).output


def test_salts_keep_prompts_apart(tiny: SimpleNamespace) -> None:
    """Oracle: hits within a salt, none across."""
    (prompt,) = tiny.make_prompts([40])
    core = EngineCore(tiny.model, EngineConfig(block_size=8))
    hits = []
    for salt in ("", "", "a", "b", "a"):
        sequence = core.add(prompt, tiny.greedy, cache_salt=salt)
        while core.has_work:
            core.step()
        hits.append(sequence.num_hit)
    assert hits == [0, 32, 0, 0, 32]


@pytest.mark.parametrize("policy", ["full", "knorm"])
def test_deterministic_mode_is_bitwise_with_hits(tiny: SimpleNamespace, policy: str) -> None:
    """Oracle: equal logits in float32, bit for bit, with a warm, a cold and no cache."""
    model, kind = tiny.make_model(torch.float32), make_policy(policy)
    (prompt,) = tiny.make_prompts([70])
    rows: list[list[torch.Tensor]] = []
    for caching, repeats in ((False, 1), (True, 2)):
        config = EngineConfig(
            block_size=8, deterministic=True, max_num_batched_tokens=24, prefix_caching=caching
        )
        core = EngineCore(model, config, kind)
        for _ in range(repeats):
            sequence = core.add(prompt, SamplingParams(seed=2, max_tokens=10, logprobs=3))
            seen: list[torch.Tensor] = []
            forward = core.runner.forward

            def recording(items, seen=seen, forward=forward, **options):
                logits = forward(items, **options)
                seen.append(logits)
                return logits

            core.runner.forward = recording
            while core.has_work:
                core.step()
            core.runner.forward = forward
            rows.append(seen[-10:])
    assert sequence.num_hit == 48
    for other in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], other, strict=True))


def test_a_poisoned_cache_is_not_passed_on(tiny: SimpleNamespace) -> None:
    """Oracle: the tokens of a sound model, after a request that saw NaN weights."""
    model = tiny.make_model()
    (prompt,) = tiny.make_prompts([40])
    core = EngineCore(model, EngineConfig(block_size=8, debug=True))
    core.step()
    sound = model.layers[0].attention.value.weight.detach().clone()
    with torch.no_grad():
        model.layers[0].attention.value.weight.fill_(float("nan"))
    failed = core.add(prompt, tiny.greedy)
    while core.has_work:
        core.step()
    with torch.no_grad():
        model.layers[0].attention.value.weight.copy_(sound)
    again = core.add(prompt, tiny.greedy)
    while core.has_work:
        core.step()
    assert failed.finish_reason == "error"
    assert (again.num_hit, again.output) == (
        0,
        tiny.run_alone(model, prompt, tiny.greedy).output,
    )
    assert core.counters.corrupted_requests == 1


def test_random_traffic_leaks_nothing_and_changes_nothing(tiny: SimpleNamespace) -> None:
    """Oracle O8 and O5: everything free at the end; the tokens of those who finished are known."""
    rng, policy = random.Random(0), make_policy("knorm")
    family = make_family(tiny, 9)
    config = EngineConfig(
        block_size=8, num_blocks=16, max_num_seqs=6, max_num_batched_tokens=48, debug=True
    )
    core = EngineCore(tiny.model, config, policy)
    params = [SamplingParams(seed=i, max_tokens=3 + 5 * i, n=1 + i % 3) for i in range(4)]
    expected: dict[tuple[int, int, int], list[int]] = {}
    live: dict[str, tuple] = {}
    names = itertools.count()
    started = 0
    while started < 80 or core.has_work:
        if started < 80 and rng.random() < 0.6:
            prompt, kind = rng.randrange(len(family)), rng.randrange(len(params))
            name, started = str(next(names)), started + 1
            sequences = core.add_choices(
                family[prompt], params[kind], request_id=name, compress=kind != 2
            )
            live[name] = (prompt, kind, sequences)
        if live and rng.random() < 0.1:
            core.abort(rng.choice(list(live)))
        core.step()
        for name in [n for n, (_, _, all_) in live.items() if all(s.finish_reason for s in all_)]:
            prompt, kind, sequences = live.pop(name)
            for sequence in sequences:
                key = (prompt, kind, sequence.request.choice)
                if sequence.finish_reason == "length":
                    assert expected.setdefault(key, sequence.output) == sequence.output
    assert len(expected) > 20
    assert core.scheduler.blocks.num_free == 16
    assert core.scheduler.blocks.num_optimistic == 0
    assert core.counters.prefix_hits > 500
    assert core.counters.preemptions > 0
