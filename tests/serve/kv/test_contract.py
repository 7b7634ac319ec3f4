"""Every cache policy through the real engine: one contract, whatever it scores."""

# Legend: H query heads, K key/value heads, T tokens, D head width.

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer
from serve.engine.companions import Companion
from serve.engine.engine import EngineCore
from serve.engine.request import SamplingParams, Sequence
from serve.engine.scheduler import EngineConfig
from serve.kv import POLICIES, policy_by_name
from serve.kv.calibrate import calibrate, layer_stats

COMPRESSING = sorted(name for name in POLICIES if name != "full")
OPTIONS = {"budget": 14, "interval": 4, "sinks": 2, "window": 3}
# Float64 sums of a few dozen terms of size about 1.
FLOAT64 = 1e-9


class Recorder(Companion):
    """Notes which positions survive each compaction."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], list[tuple[int, Tensor]]] = {}
        self.masses: dict[tuple[str, int], list[tuple[int, Tensor, Tensor]]] = {}

    def compacting(self, view, sequences, keep_RKS) -> None:
        """Store (tokens so far, positions kept per head) by request and layer."""
        kept_RKS = view.slot_positions().gather(2, keep_RKS)
        for number, layer in enumerate(view.layers):
            for index, sequence in enumerate(sequences):
                key = (sequence.request.request_id, layer)
                row, length = number * len(sequences) + index, sequence.num_tokens
                self.kept.setdefault(key, []).append((length, kept_RKS[row]))
                if "mass" in view.observed:
                    mass = view.observed["mass"][row].gather(1, keep_RKS[row])
                    self.masses.setdefault(key, []).append((length, kept_RKS[row], mass))


def run(model, stats, policy, requests, recorder=None, **settings):
    """Run prompts to their end; return sequences, what was kept, and the logits of all tokens."""
    core = EngineCore(model, EngineConfig(debug=True, **settings), policy, stats)
    recorder, seen, forward = recorder or Recorder(), {}, core.runner.forward
    core.companions.companions.append(recorder)

    def recording(items, **options):
        logits = forward(items, **options)
        for item, row in zip(items, logits, strict=True):
            if item.count == item.sequence.remaining:
                seen.setdefault(item.sequence.request.request_id, []).append(row)
        return logits

    core.runner.forward = recording
    sequences = [core.add(p, params, request_id=name) for name, p, params in requests]
    while core.has_work:
        core.step()
    return sequences, recorder.kept, seen


def masked_dense(model: LipschitzTransformer, sequence: Sequence, kept, weights=None) -> Tensor:
    """Oracle: one forward pass over all tokens; evicted keys are hidden from later queries."""
    weights = {} if weights is None else weights
    tokens = sequence.tokens[:-1]
    length = len(tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = model.config.layer(layer)
        is_seen_KTT = torch.ones(config.kv_heads, length, length, dtype=torch.bool).tril()
        for start, positions in kept.get((sequence.request.request_id, layer), []):
            for head in range(config.kv_heads):
                is_gone = torch.ones(start, dtype=torch.bool)
                is_gone[positions[head]] = False
                is_seen_KTT[head, start:, :start] &= ~is_gone
        distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        z = q[0] @ k[0].repeat_interleave(config.group, 0).mT * config.logit_scale
        bias = model.layers[layer].attention.position_bias
        z = z if bias is None else z + bias[:, distance]
        z = z.masked_fill(~is_seen_KTT.repeat_interleave(config.group, 0), -torch.inf)
        weights[layer] = z.softmax(-1)
        return (weights[layer] @ v[0].repeat_interleave(config.group, 0))[None]

    with torch.no_grad():
        return model(torch.tensor(tokens)[None], attend=attend)[
            0, len(sequence.request.prompt) - 1 :
        ]


@pytest.fixture(scope="module")
def setup(tiny: SimpleNamespace) -> SimpleNamespace:
    """Return the tiny model with its statistics, three requests, and their run as a batch."""
    tokens = torch.tensor(tiny.make_prompts([40] * 4, seed=7))
    stats = layer_stats(calibrate(tiny.model, [tokens]), tiny.model)
    prompts = tiny.make_prompts([5, 17, 33], seed=1)
    params = [
        SamplingParams(seed=seed, max_tokens=count) for seed, count in enumerate((30, 16, 12))
    ]
    requests = list(zip(("a", "b", "c"), prompts, params, strict=True))

    @cache
    def together(name: str):
        policy = policy_by_name(name, **OPTIONS)
        settings = {"max_num_batched_tokens": 8, "block_size": 4, "max_num_seqs": 3}
        return policy, *run(tiny.model, stats, policy, requests, recorders[name], **settings)

    recorders = {name: Recorder() for name in COMPRESSING}
    return SimpleNamespace(
        model=tiny.model,
        stats=stats,
        requests=requests,
        together=together,
        masses=recorders["h2o"].masses,
    )


@pytest.mark.parametrize("name", COMPRESSING)
def test_engine_equals_masked_dense_attention(setup: SimpleNamespace, name: str) -> None:
    """Oracle: dense attention with a mask per layer and head; several compactions, chunks of 8."""
    _, sequences, kept, seen = setup.together(name)
    for sequence in sequences:
        assert sequence.compactions >= 2
        expected = masked_dense(setup.model, sequence, kept)
        got = torch.stack(seen[sequence.request.request_id])
        torch.testing.assert_close(got, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("name", COMPRESSING)
def test_compaction_inside_the_prompt_equals_masked_dense_attention(
    setup: SimpleNamespace, name: str
) -> None:
    """Oracle: the same mask; the longest prompt is compacted while it is read."""
    policy = policy_by_name(name, compress_prefill=True, **OPTIONS)
    settings = {"max_num_batched_tokens": 10, "block_size": 4, "max_num_seqs": 2}
    sequences, kept, seen = run(setup.model, setup.stats, policy, setup.requests[1:], **settings)
    assert min(start for start, _ in kept["c", 0]) < len(sequences[1].request.prompt)
    for sequence in sequences:
        expected = masked_dense(setup.model, sequence, kept)
        got = torch.stack(seen[sequence.request.request_id])
        torch.testing.assert_close(got, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("name", COMPRESSING)
def test_cached_prompts_change_nothing(setup: SimpleNamespace, name: str) -> None:
    """Oracle: the same request without a prefix cache; a policy must see the queries it needs."""
    policy = policy_by_name(name, **OPTIONS)
    request, settings = setup.requests[2], {"block_size": 4, "max_num_seqs": 1}
    again = [request, ("again", *request[1:])]
    sequences, kept, seen = run(setup.model, setup.stats, policy, again, **settings)
    limit, length = policy.prefix_limit(len(request[1])), len(request[1])
    assert sequences[1].num_hit == min(length - 1 if limit is None else limit, length - 1) // 4 * 4
    fresh, kept_fresh, seen_fresh = run(
        setup.model, setup.stats, policy, [request], prefix_caching=False, **settings
    )
    assert fresh[0].compactions >= 2
    for (_, layer), steps in kept_fresh.items():
        for (_, ours), (_, theirs) in zip(steps, kept["again", layer], strict=True):
            assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)
    got, expected = torch.stack(seen["again"]), torch.stack(seen_fresh[request[0]])
    torch.testing.assert_close(got, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("name", COMPRESSING)
def test_kept_tokens_depend_on_the_request_alone(setup: SimpleNamespace, name: str) -> None:
    """Oracle: solo runs with other chunks and blocks keep the same positions and give the same."""
    policy, sequences, kept, _ = setup.together(name)
    for request, sequence in zip(setup.requests, sequences, strict=True):
        alone, kept_alone, _ = run(
            setup.model, setup.stats, policy, [request], max_num_batched_tokens=64, block_size=16
        )
        assert alone[0].output == sequence.output
        for key, steps in kept_alone.items():
            assert [step for step, _ in steps] == [step for step, _ in kept[key]]
            for (_, ours), (_, theirs) in zip(steps, kept[key], strict=True):
                assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)


@pytest.mark.parametrize("name", COMPRESSING)
def test_kept_tokens_honour_the_protection(setup: SimpleNamespace, name: str) -> None:
    """Property: budget, distinct tokens, sinks, recent tokens and a short prompt among them."""
    policy, sequences, kept, _ = setup.together(name)
    prompts = {s.request.request_id: len(s.request.prompt) for s in sequences}
    for (request, _), steps in kept.items():
        for length, positions_KS in steps:
            pinned = policy.pinned(prompts[request])
            must = {*range(pinned), *range(length - policy.window, length)}
            for positions_S in positions_KS:
                assert positions_S.shape == (policy.budget,)
                assert len(set(positions_S.tolist())) == policy.budget
                assert must <= set(positions_S.tolist())


@pytest.mark.parametrize("name", COMPRESSING)
def test_bfloat16_caches_run(tiny: SimpleNamespace, setup: SimpleNamespace, name: str) -> None:
    """Property: every policy scores a bfloat16 cache; two runs are equal."""
    model, policy = tiny.make_model(torch.bfloat16), policy_by_name(name, **OPTIONS)
    first, second = (
        run(model, setup.stats, policy, setup.requests[1:2], block_size=4) for _ in range(2)
    )
    assert first[0][0].finish_reason == "length"
    assert first[0][0].compactions >= 2
    assert first[0][0].output == second[0][0].output
    assert all(torch.equal(a, b) for a, b in zip(first[2]["b"], second[2]["b"], strict=True))


def test_attention_mass_in_the_engine_is_that_of_dense_attention(setup: SimpleNamespace) -> None:
    """Oracle: dense weights, masked as the cache was, summed per position up to each compaction."""
    _, sequences, kept, _ = setup.together("h2o")
    recorded = setup.masses
    for sequence in sequences:
        name, weights = sequence.request.request_id, {}
        masked_dense(setup.model, sequence, kept, weights)
        for layer in (0, 1):
            config = setup.model.config.layer(layer)
            assert len(recorded[name, layer]) >= 2
            for start, positions_KS, mass_KS in recorded[name, layer]:
                sums_HT = weights[layer][:, :start].sum(1)
                sums_KT = sums_HT.unflatten(0, (config.kv_heads, -1)).sum(1)
                expected = sums_KT.gather(1, positions_KS)[: config.content_kv_heads]
                got = mass_KS[: config.content_kv_heads]
                torch.testing.assert_close(got, expected, atol=FLOAT64, rtol=FLOAT64)


@pytest.mark.parametrize("selection", ["union", "per_head"])
@pytest.mark.parametrize("name", ["triattention", "h2o", "keydiff"])
def test_shared_sets_stay_shared(tiny: SimpleNamespace, selection: str, name: str) -> None:
    """Oracle: masked dense attention; all heads, or those of one index, hold the same tokens."""
    model = tiny.make_model(
        heads=4, kv_heads=2, content_heads=(4, 2, 4), head_dim=8, position_bias=True
    )
    stats = layer_stats(calibrate(model, [torch.tensor(tiny.make_prompts([40], seed=7))]), model)
    policy = policy_by_name(name, selection=selection, **OPTIONS)
    params = SamplingParams(seed=3, max_tokens=20)
    requests = [("a", tiny.make_prompts([16])[0], params)]
    sequences, kept, seen = run(model, stats, policy, requests, block_size=4)
    assert sequences[0].compactions >= 4
    expected = masked_dense(model, sequences[0], kept)
    torch.testing.assert_close(torch.stack(seen["a"]), expected, atol=FLOAT64, rtol=FLOAT64)
    for layer in range(3):
        for (_, ours), (_, first) in zip(kept["a", layer], kept["a", 0], strict=True):
            ours, first = ours.sort(dim=-1).values, first.sort(dim=-1).values
            assert torch.equal(ours, first if selection == "per_head" else first[:1].expand(2, -1))
