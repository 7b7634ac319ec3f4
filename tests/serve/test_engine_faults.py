"""The engine under bad prompts, bad numbers and faults: others go on, nothing leaks."""

from collections.abc import Sequence as Rows
from types import SimpleNamespace

import pytest
import torch

from common.errors import ConfigError, DataError
from serve.engine.attention import Part
from serve.engine.blocks import BlockTable
from serve.engine.companions import Companion
from serve.engine.config import EngineConfig
from serve.engine.engine import OUT_OF_MEMORY, EngineCore
from serve.engine.evidence import Evidence
from serve.engine.request import Item, Sequence
from serve.engine.sampling_params import SamplingParams
from serve.kv import Policy, WindowPolicy
from serve.kv.policies import ExpectedAttentionPolicy, H2OPolicy


def test_finish_reasons(tiny: SimpleNamespace) -> None:
    """Oracle: the documented reasons: length, context, stop token, abort."""
    prompt = tiny.make_prompts([80])[0]
    assert tiny.run_alone(tiny.model, prompt, tiny.greedy).finish_reason == "length"
    full = tiny.run_alone(tiny.model, prompt, SamplingParams(temperature=0.0, max_tokens=None))
    assert (full.finish_reason, len(full.tokens)) == ("length", tiny.context)
    third = full.output[2]
    stop = SamplingParams(temperature=0.0, max_tokens=None, stop_token_ids=(third,))
    stopped = tiny.run_alone(tiny.model, prompt, stop)
    assert stopped.finish_reason == "stop"
    assert stopped.output == full.output[: full.output.index(third) + 1]
    core = EngineCore(tiny.model)
    sequence = core.add(prompt, tiny.greedy, request_id="x")
    core.step()
    core.abort("x")
    core.abort("never seen")
    assert (sequence.finish_reason, core.has_work) == ("abort", False)
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks


def test_add_rejects_unusable_prompts(tiny: SimpleNamespace) -> None:
    """Oracle: one line that names the numbers; the engine goes on afterwards."""
    core = EngineCore(tiny.model, EngineConfig(num_blocks=4, block_size=8))
    for prompt, words in (
        ([], "empty"),
        ([0] * tiny.context, f"{tiny.context} tokens.*context is {tiny.context}"),
        ([0] * 500, f"500 tokens.*context is {tiny.context}"),
        ([tiny.vocab], f"0 to {tiny.vocab - 1}"),
        ([-1], "integer"),
        ([True], "integer"),
        ([1.5], "integer"),
        ([0] * 60, "pool has 4"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            core.add(prompt, tiny.greedy)
        assert "\n" not in str(caught.value)
    core.add([1, 2], tiny.greedy, request_id="twice")
    with pytest.raises(DataError, match="in use"):
        core.add([1, 2], tiny.greedy, request_id="twice")
    while core.has_work:
        core.step()
    assert core.scheduler.blocks.num_free == 4


def test_a_prompt_may_leave_room_for_one_token(tiny: SimpleNamespace) -> None:
    """Oracle: context - 1 tokens are accepted, with exactly one new token."""
    sequence = tiny.run_alone(tiny.model, tiny.make_prompts([tiny.context - 1])[0], tiny.greedy)
    assert (len(sequence.output), sequence.finish_reason) == (1, "length")


def test_bad_logits_end_one_request_and_spare_the_others(tiny: SimpleNamespace) -> None:
    """Oracle: solo runs of the others; NaN in the embedding of one token only."""
    model = tiny.make_model()
    prompts = [[1, 2, 3], [4, 5, 49], [6, 7, 8]]
    alone = [tiny.run_alone(model, p, tiny.greedy).output for p in prompts]
    assert all(49 not in tokens for tokens in (alone[0], alone[2]))
    with torch.no_grad():
        model.embedding.weight[49] = float("nan")
    core = EngineCore(model, EngineConfig(debug=True))
    sequences = [core.add(p, tiny.greedy) for p in prompts]
    while core.has_work:
        core.step()
    assert [s.finish_reason for s in sequences] == ["length", "error", "length"]
    assert "not finite" in sequences[1].error
    assert [sequences[0].output, sequences[2].output] == [alone[0], alone[2]]
    later = core.add(prompts[0], tiny.greedy)
    while core.has_work:
        core.step()
    assert later.output == alone[0]


@pytest.mark.parametrize("where", ["forward", "compact"])
def test_a_fault_ends_the_step_and_leaks_nothing(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Oracle: the invariant check, a full free list, and an unharmed next request."""
    policy = WindowPolicy(budget=16, interval=4, sinks=2, window=4)
    core = EngineCore(tiny.model, EngineConfig(block_size=8, debug=True), policy)
    prompts = tiny.make_prompts([5, 30])
    original = getattr(core.runner, where)

    def fault(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(core.runner, where, original)
        raise MemoryError("no memory\nbelow it the details")

    monkeypatch.setattr(core.runner, where, fault)
    failed = [core.add(prompt, tiny.greedy) for prompt in prompts]
    while core.has_work:
        core.step()
    assert {s.finish_reason for s in failed} <= {"error", "length"}
    assert {s.error for s in failed if s.error} == {"MemoryError: no memory"}
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks
    after = core.add(prompts[0], tiny.greedy)
    while core.has_work:
        core.step()
    assert after.output == tiny.run_alone(tiny.model, prompts[0], tiny.greedy, policy).output


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}])
@pytest.mark.parametrize("budget", [None, 16])
def test_steps_short_of_memory_run_with_fewer_requests(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, budget: int | None, settings: dict
) -> None:
    """Oracle: solo runs, where no step of more than five requests fits the memory."""
    policy = WindowPolicy(budget=16, interval=4, sinks=2, window=4) if budget else None
    core = EngineCore(tiny.model, EngineConfig(debug=True, **settings), policy)
    prompts = tiny.make_prompts([5, 30, 9, 22, 12, 7, 3, 18, 40, 11])
    forward, shortages = core.runner.forward, []

    def short(items: list[Item], **kwargs: object) -> torch.Tensor:
        if len(items) > 5 or not shortages:
            shortages.append(len(items))
            raise torch.OutOfMemoryError("CUDA out of memory.\nDetails")
        return forward(items, **kwargs)

    monkeypatch.setattr(core.runner, "forward", short)
    sequences = [core.add(prompt, tiny.greedy) for prompt in prompts]
    while core.has_work:
        core.step()
    assert shortages
    assert core.counters.failed_steps == 0
    alone = [tiny.run_alone(tiny.model, p, tiny.greedy, policy, **settings) for p in prompts]
    assert [s.output for s in sequences] == [s.output for s in alone]
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks


class Shortage(Companion):
    """Raises in one layer of every step, the first time that the step runs."""

    def __init__(self, layer: int) -> None:
        self.layer, self.steps = layer, set[int]()

    def attended(self, part: Part, sequences: Rows[Sequence]) -> None:
        """Run out of memory."""
        step = sum(sequence.num_tokens for sequence in sequences)
        if part.layer == self.layer and step not in self.steps:
            self.steps.add(step)
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", [H2OPolicy, ExpectedAttentionPolicy])
def test_queries_are_observed_once_though_steps_run_again(
    tiny: SimpleNamespace, kind: type[Policy], layer: int
) -> None:
    """Oracle: what is observed in an engine that has the memory; then its tokens."""
    policy = kind(budget=16, interval=4, sinks=2, window=4)
    cores = [EngineCore(tiny.model, EngineConfig(debug=True), policy) for _ in range(2)]
    shortage = Shortage(layer)
    cores[1].companions.companions.append(shortage)
    sequences = [core.add(tiny.make_prompts([30])[0], tiny.greedy) for core in cores]
    while cores[0].has_work:
        for core in cores:
            core.step()
        seen = [
            [
                evidence.observer.observed((layer,), list(evidence._rows.values()))
                for layer in (0, 1)
            ]
            for core in cores
            if isinstance(evidence := core.companions.companions[0], Evidence)
        ]
        torch.testing.assert_close(seen[1], seen[0])
    assert len(shortage.steps) == len(sequences[0].output)
    assert cores[1].counters.failed_steps == 0
    assert sequences[1].output == sequences[0].output


def test_a_lasting_lack_of_memory_ends_requests_with_one_line(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every request fails after a second try; what ran before is as it was alone."""
    core = EngineCore(tiny.model, EngineConfig(debug=True))
    prompts = tiny.make_prompts([5, 9, 7])
    calls: list[int] = []

    def short(items: list[Item], **kwargs: object) -> torch.Tensor:
        calls.append(len(items))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "forward", short)
        failed = [core.add(prompt, tiny.greedy) for prompt in prompts]
        core.step()
        assert (calls, core.scheduler.stats.preemptions) == ([3, 1], 2)
        while core.has_work:
            core.step()
    assert {(s.finish_reason, s.error) for s in failed} == {("error", OUT_OF_MEMORY)}
    assert "\n" not in OUT_OF_MEMORY
    later = core.add(prompts[0], tiny.greedy)
    while core.has_work:
        core.step()
    assert later.output == tiny.run_alone(tiny.model, prompts[0], tiny.greedy).output


def test_requests_wait_while_the_pool_gives_no_blocks(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: solo runs; a step in which ``grow`` answers False leaves the request out."""
    core = EngineCore(tiny.model, EngineConfig(block_size=8, debug=True))
    prompts = tiny.make_prompts([5, 30, 9, 22])
    grow, calls = core.scheduler.blocks.grow, iter(range(9999))

    def stingy(table: BlockTable, num_slots: int) -> bool:
        is_alone = len(core.scheduler.running) < 2
        return (is_alone or next(calls) % 3 > 0) and grow(table, num_slots)

    monkeypatch.setattr(core.scheduler.blocks, "grow", stingy)
    sequences = [core.add(prompt, tiny.greedy) for prompt in prompts]
    while core.has_work:
        core.step()
    alone = [tiny.run_alone(tiny.model, p, tiny.greedy).output for p in prompts]
    assert [s.output for s in sequences] == alone
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks


def test_the_pool_keeps_within_its_bytes(tiny: SimpleNamespace) -> None:
    """Oracle: bytes of the tensors; what cannot fit is refused with the value and the remedy."""
    config = EngineConfig(block_size=8, cache_bytes=20_000)
    core = EngineCore(tiny.model, config)
    held = sum(x.nbytes for pool in core.runner.pools.group_pools for x in pool.tensors)
    size = held // core.scheduler.blocks.num_blocks
    assert held <= config.cache_bytes < held + size
    with pytest.raises(DataError, match=r"lower max_tokens, or raise engine\.cache_bytes"):
        core.add(tiny.make_prompts([90])[0], tiny.greedy)
    message = f"engine.cache_bytes={size - 1}: one block of 8 tokens takes {size} bytes"
    with pytest.raises(ConfigError, match=message):
        EngineCore(tiny.model, EngineConfig(block_size=8, cache_bytes=size - 1))


def test_opting_out_keeps_the_cache_whole(tiny: SimpleNamespace) -> None:
    """Oracle: the full cache's tokens, beside a compressed request."""
    policy = WindowPolicy(budget=8, interval=4, sinks=2, window=4)
    prompt = tiny.make_prompts([20])[0]
    core = EngineCore(tiny.model, EngineConfig(debug=True), policy)
    whole, cut = core.add(prompt, tiny.greedy, compress=False), core.add(prompt, tiny.greedy)
    while core.has_work:
        core.step()
    assert whole.output == tiny.run_alone(tiny.model, prompt, tiny.greedy).output
    assert (whole.compactions, whole.kept_fraction) == (0, 1.0)
    assert cut.compactions > 0
    assert cut.kept_fraction < 0.7


def test_a_fault_while_choices_wait_for_their_prompt_spares_them(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the leader ends, the others run alone, with the tokens of their own seeds."""
    (prompt,) = tiny.make_prompts([40])
    core = EngineCore(tiny.model, EngineConfig(block_size=8, max_num_batched_tokens=24, debug=True))
    choices = core.add_choices(prompt, SamplingParams(n=3, seed=4, max_tokens=6))
    core.step()
    forward = core.runner.forward

    def fault(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(core.runner, "forward", forward)
        raise MemoryError("no memory")

    monkeypatch.setattr(core.runner, "forward", fault)
    while core.has_work:
        core.step()
    assert [s.finish_reason for s in choices] == ["error", "length", "length"]
    assert core.counters.failed_steps == 1
    for sequence in choices[1:]:
        alone = SamplingParams(seed=sequence.request.seed, max_tokens=6)
        assert sequence.output == tiny.run_alone(tiny.model, prompt, alone).output
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks


def test_wrong_books_stop_the_engine(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the documented AssertionError, after a fault even without ``debug``."""
    core = EngineCore(tiny.model, EngineConfig(block_size=8))
    core.add([1, 2, 3], tiny.greedy)
    other = core.add([4, 5, 6], tiny.greedy)
    core.step()

    def fault(items: list, **kwargs: object) -> None:
        other.block_table.append(other.block_table[0])
        raise RuntimeError("the fault beneath")

    monkeypatch.setattr(core.runner, "forward", fault)
    with pytest.raises(AssertionError, match="references"):
        core.step()
