"""Several choices, end-of-text tokens, log-probabilities of prompts: what a request may ask for."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import ConfigError, DataError
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampler import choice_seed
from serve.engine.sampling_params import SamplingParams
from serve.kv import WindowPolicy

WINDOW = WindowPolicy(budget=16, interval=6, sinks=2, window=4)


def run(core: EngineCore) -> None:
    """Step to the end."""
    while core.has_work:
        core.step()
    assert core.scheduler.blocks.num_free == core.scheduler.blocks.num_blocks


@pytest.mark.parametrize("policy", [None, WINDOW])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_are_requests_of_derived_seeds(
    tiny: SimpleNamespace, policy: WindowPolicy | None, prefix_caching: bool
) -> None:
    """Oracle O7: each choice run alone with its own seed; all of them different."""
    (prompt,) = tiny.make_prompts([30])
    config = EngineConfig(block_size=8, debug=True, prefix_caching=prefix_caching)
    core = EngineCore(tiny.model, config, policy)
    choices = core.add_choices(prompt, SamplingParams(n=4, seed=9, max_tokens=20))
    run(core)
    for index, sequence in enumerate(choices):
        assert sequence.request.seed == choice_seed(9, index)
        alone = SamplingParams(seed=sequence.request.seed, max_tokens=20)
        assert sequence.output == tiny.run_alone(tiny.model, prompt, alone, policy).output
        assert sequence.num_hit == (24 if index and prefix_caching else 0)
    assert len({tuple(sequence.output) for sequence in choices}) == 4


def test_choices_share_the_blocks_of_their_prompt(tiny: SimpleNamespace) -> None:
    """Oracle: 16 choices of a 65-token prompt in a pool that holds two such prompts."""
    (prompt,) = tiny.make_prompts([65])
    config = EngineConfig(block_size=8, num_blocks=8 + 16 * 2, debug=True)
    core = EngineCore(tiny.model, config)
    choices = core.add_choices(prompt, SamplingParams(n=16, seed=1, max_tokens=8))
    most = 0
    while core.has_work:
        core.step()
        most = max(most, len(core.scheduler.running))
    assert most == 16
    assert all(sequence.preemptions == 0 for sequence in choices)
    assert all(sequence.finish_reason == "length" for sequence in choices)


def test_greedy_choices_are_identical(tiny: SimpleNamespace) -> None:
    """Oracle: nothing is random about them."""
    core = EngineCore(tiny.model)
    choices = core.add_choices([1, 2, 3], SamplingParams(n=3, temperature=0.0, max_tokens=9))
    run(core)
    assert len({tuple(sequence.output) for sequence in choices}) == 1


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_abort_ends_all_choices_in_any_state(tiny: SimpleNamespace, steps: int) -> None:
    """Oracle: an empty pool; the name is free again."""
    (prompt,) = tiny.make_prompts([40])
    core = EngineCore(tiny.model, EngineConfig(block_size=8, max_num_batched_tokens=24, debug=True))
    choices = core.add_choices(prompt, SamplingParams(n=3, max_tokens=20), request_id="x")
    with pytest.raises(DataError, match="in use"):
        core.add(prompt, tiny.greedy, request_id="x")
    for _ in range(steps):
        core.step()
    core.finish(choices[1], "stop")
    core.abort("x")
    assert [s.finish_reason for s in choices] == ["abort", "stop", "abort"]
    assert not core.has_work
    again = core.add(prompt, tiny.greedy, request_id="x")
    run(core)
    assert again.finish_reason == "length"


def test_seeds_of_choices_are_spread() -> None:
    """Oracle: no collision among many; signed 64 bits; the first is the request's own."""
    seeds = {choice_seed(s, c) for s in range(-200, 200) for c in range(16)}
    assert len(seeds) == 400 * 16
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert choice_seed(-7, 0) == -7


def test_the_end_of_text_token_stops_unless_ignored_or_too_early(tiny: SimpleNamespace) -> None:
    """Oracle: the text of a model without such a token; it stops at its first occurrence."""
    params = {"temperature": 0.9, "seed": 3, "max_tokens": 40}
    free = tiny.run_alone(tiny.model, [5, 6], SamplingParams(**params)).output
    eos = free[10]
    first = free.index(eos)
    core = EngineCore(tiny.model, eos_ids=[eos])
    stopped = core.add([5, 6], SamplingParams(**params))
    ignoring = core.add([5, 6], SamplingParams(**params, ignore_eos=True))
    late = core.add([5, 6], SamplingParams(**params, min_tokens=first + 5))
    other = core.add([5, 6], SamplingParams(**params, stop_token_ids=(free[2],), min_tokens=4))
    run(core)
    assert (stopped.output, stopped.finish_reason) == (free[: first + 1], "stop")
    assert (ignoring.output, ignoring.finish_reason) == (free, "length")
    assert len(late.output) >= first + 5
    assert eos not in late.output[: first + 5]
    assert free[2] not in other.output[:4]
    assert eos not in other.output[:4]


@pytest.mark.parametrize("tokens_per_step", [7, 64])
@pytest.mark.parametrize("deterministic", [False, True])
def test_prompt_logprobs_are_those_of_the_whole_forward_pass(
    tiny: SimpleNamespace, tokens_per_step: int, deterministic: bool
) -> None:
    """Oracle: log-softmax of the training forward pass; the prefix cache is not read for it."""
    (prompt,) = tiny.make_prompts([33])
    config = EngineConfig(
        block_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=tokens_per_step,
        deterministic=deterministic,
        debug=True,
    )
    core = EngineCore(tiny.model, config, WINDOW)
    core.add(prompt, tiny.greedy)
    run(core)
    params = SamplingParams(seed=1, max_tokens=30, prompt_logprobs=2, n=2)
    beside = core.add(prompt, tiny.greedy)
    scored, second = core.add_choices(prompt, params)
    short = core.add([7], SamplingParams(prompt_logprobs=0, max_tokens=2))
    run(core)
    with torch.no_grad():
        logits = tiny.model(torch.tensor(prompt)[None])[0]
    expected = torch.log_softmax(logits, -1)
    assert len(scored.prompt_logprobs) == 32
    for position, row in enumerate(scored.prompt_logprobs):
        token = prompt[position + 1]
        assert next(iter(row)) == token
        assert set(expected[position].topk(2).indices.tolist()) <= set(row)
        for key, value in row.items():
            assert value == pytest.approx(float(expected[position, key]), abs=1e-9)
    assert (scored.num_hit, scored.compactions) == (0, 0)
    assert second.prompt_logprobs == short.prompt_logprobs == []
    assert beside.compactions > 0
    assert (
        scored.output
        == tiny.run_alone(tiny.model, prompt, SamplingParams(seed=1, max_tokens=30)).output
    )


def test_prompt_logprobs_survive_preemption(tiny: SimpleNamespace) -> None:
    """Oracle: the same request with all the room it needs."""
    prompts = tiny.make_prompts([30, 30])
    params = SamplingParams(seed=1, max_tokens=40, prompt_logprobs=1)
    alone = [tiny.run_alone(tiny.model, prompt, params) for prompt in prompts]
    core = EngineCore(tiny.model, EngineConfig(block_size=8, num_blocks=11, debug=True))
    both = [core.add(prompt, params) for prompt in prompts]
    run(core)
    assert sum(sequence.preemptions for sequence in both) > 0
    for one, other in zip(alone, both, strict=True):
        assert one.output == other.output
        for a, b in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-9)


def test_tokens_outside_the_vocabulary_are_refused(tiny: SimpleNamespace) -> None:
    """Oracle: one line with the id and the range; nothing is queued."""
    core = EngineCore(tiny.model)
    for params in (
        SamplingParams(logit_bias={tiny.vocab: 1.0}),
        SamplingParams(stop_token_ids=(tiny.vocab,)),
    ):
        with pytest.raises(ConfigError, match=f"{tiny.vocab}.*0 to {tiny.vocab - 1}") as caught:
            core.add([1], params)
        assert "\n" not in str(caught.value)
    assert not core.has_work


def test_penalties_and_bias_follow_the_sequence_through_preemption(tiny: SimpleNamespace) -> None:
    """Oracle: a roomy engine; a bias of -100 keeps tokens away, of 100 makes one certain."""
    prompts = tiny.make_prompts([30, 30, 12])
    params = [
        SamplingParams(seed=1, max_tokens=40, frequency_penalty=2.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, max_tokens=40, presence_penalty=1.5),
        SamplingParams(seed=2, max_tokens=20, logit_bias=dict.fromkeys(range(25), -100.0)),
    ]
    alone = [tiny.run_alone(tiny.model, p, q).output for p, q in zip(prompts, params, strict=True)]
    core = EngineCore(tiny.model, EngineConfig(block_size=8, num_blocks=12, debug=True))
    live = [core.add(p, q) for p, q in zip(prompts, params, strict=True)]
    run(core)
    assert [sequence.output for sequence in live] == alone
    assert sum(sequence.preemptions for sequence in live) > 0
    assert min(alone[2]) >= 25
    assert len(set(alone[0])) > len(
        set(tiny.run_alone(tiny.model, prompts[0], SamplingParams(seed=1, max_tokens=40)).output)
    )
    sure = SamplingParams(seed=2, max_tokens=5, logit_bias={7: 100.0})
    assert tiny.run_alone(tiny.model, prompts[2], sure).output == [7] * 5
