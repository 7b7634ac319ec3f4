"""The engine under bad prompts, bad numbers and faults: others go on, nothing leaks."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import DataError
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams
from serve.kv import WindowPolicy


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
