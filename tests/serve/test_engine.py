"""The engine against a model without cache, masked dense attention, and solo runs.

Most tests run in float64, where a fault shows as a factor of a million and not as rounding.
"""

# Legend: H query heads, K key/value heads, T new tokens, S tokens so far, D head width.

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer
from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.request import Sequence
from serve.engine.sampler import sample
from serve.engine.sampling_params import SamplingParams
from serve.kernels import gather_pages
from serve.kv import CacheView, FullPolicy, Policy, WindowPolicy

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
# Greedy text of a random model soon repeats itself; sampled text does not.
SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=16)
# Float64 sums of a few dozen terms of size about 1; anything structural is a million times larger.
FLOAT64 = 1e-9
FLOAT32 = 2e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstComponentPolicy(Policy):
    """Keep the keys with the largest, or at odd lengths smallest, first rotated component."""

    name: ClassVar[str] = "first-component"
    scores_positional: ClassVar[bool] = True

    def score(self, view: CacheView) -> Tensor:
        """Return k[..., 0] with the sign of the next query's position."""
        sign_R11 = 1 - 2 * (view.positions_R % 2)[:, None, None]
        return gather_pages(view.k_pool, view.tables_RN)[..., 0] * sign_R11


def record_logits(core: EngineCore) -> dict[str, list[Tensor]]:
    """Collect the logits of every sampled token by request."""
    seen: dict[str, list[Tensor]] = {}
    forward = core.runner.forward

    def recording(items, **options):
        logits = forward(items, **options)
        for item, row in zip(items, logits, strict=True):
            if item.count == item.sequence.remaining:
                seen.setdefault(item.sequence.request.request_id, []).append(row)
        return logits

    core.runner.forward = recording
    return seen


def next_token(row_V: Tensor, params: SamplingParams, position: int) -> int:
    """Return the token that the (separately tested) sampler draws from one row."""
    if params.temperature == 0:
        return int(row_V.argmax())
    return sample(row_V[None], [params], [params.seed], [position])[0].token


def no_cache(model: LipschitzTransformer, sequence: Sequence) -> tuple[list, list]:
    """Oracle O1: recompute the whole sequence for every token."""
    prompt, params = sequence.request.prompt, sequence.request.params
    tokens, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(params.max_tokens):
            rows.append(model(torch.tensor(tokens)[None])[0, -1])
            tokens.append(next_token(rows[-1], params, len(tokens)))
    return tokens[len(prompt) :], rows


class DenseCache:
    """Oracle O2: keeps every key and value and hides the evicted ones by a mask per head."""

    def __init__(self, model: LipschitzTransformer, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.pinned, self.trigger = policy.sinks, policy.budget + policy.interval

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the T newest tokens to all tokens not hidden, causally."""
        config, new = self.model.config.layer(layer), k.shape[2]
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        self.keys[layer], self.values[layer] = k, v
        kept_KS = torch.ones(k.shape[1:3], dtype=torch.bool)
        if layer in self.kept:
            kept_KS[:, : self.kept[layer].shape[1]] = self.kept[layer]
        self.kept[layer] = kept_KS
        total = k.shape[2]
        distance_TS = torch.arange(total - new, total)[:, None] - torch.arange(total)[None]
        z_HTS = (q[0] @ k[0].repeat_interleave(config.group, 0).mT) * config.logit_scale
        bias = self.model.layers[layer].attention.position_bias
        if bias is not None:
            z_HTS = z_HTS + bias[:, distance_TS.clamp(min=0)]
        hidden = (distance_TS < 0) | ~kept_KS.repeat_interleave(config.group, 0)[:, None]
        weights = torch.softmax(z_HTS.masked_fill(hidden, -torch.inf), -1)
        return (weights @ v[0].repeat_interleave(config.group, 0))[None]

    def evict(self) -> None:
        """Hide all but the budget, by a plain sort in Python."""
        for layer, kept_KS in self.kept.items():
            for head, kept_S in enumerate(kept_KS):
                alive = kept_S.nonzero()[:, 0].tolist()
                newest = max(alive)

                def rank(slot: int, layer: int = layer, head: int = head, newest=newest) -> tuple:
                    protected = slot < self.pinned or slot > newest - self.policy.window
                    score = slot
                    if isinstance(self.policy, FirstComponentPolicy):
                        sign = 1 - 2 * (self.keys[layer].shape[2] % 2)
                        score = sign * float(self.keys[layer][0, head, slot, 0])
                    return (protected, score, slot)

                chosen = sorted(alive, key=rank, reverse=True)[: self.policy.budget]
                kept_S[:] = False
                kept_S[chosen] = True

    def generate(self, sequence: Sequence) -> tuple[list, list]:
        """Return the tokens and their logits under eviction."""
        prompt, params = sequence.request.prompt, sequence.request.params
        tokens, rows, fresh = list(prompt), [], list(prompt)
        if 2 * len(prompt) <= self.policy.budget:
            self.pinned = max(self.pinned, len(prompt))
        with torch.no_grad():
            for _ in range(params.max_tokens):
                while fresh:
                    room = len(fresh)
                    if self.policy.compress_prefill:
                        room = min(room, self.trigger - self.alive)
                    start = len(tokens) - len(fresh)
                    positions = torch.arange(start, start + room)[None]
                    logits = self.model(torch.tensor(fresh[:room])[None], positions, self.attend)
                    fresh = fresh[room:]
                    if self.alive >= self.trigger:
                        self.evict()
                rows.append(logits[0, -1])
                fresh = [next_token(rows[-1], params, len(tokens))]
                tokens += fresh
        return tokens[len(prompt) :], rows

    @property
    def alive(self) -> int:
        """Slots not hidden, the same in every layer and head."""
        return int(self.kept[0][0].sum()) if self.kept else 0


def compare(sequence: Sequence, seen: dict, expected: tuple[list, list], tolerance: float) -> None:
    """Check tokens exactly and logits within the tolerance."""
    tokens, rows = expected
    assert sequence.output == tokens
    got = torch.stack(seen[sequence.request.request_id])
    torch.testing.assert_close(got, torch.stack(rows), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tokens_per_step", [8, 200])
def test_step_equals_recomputation_without_cache(
    tiny: SimpleNamespace, tokens_per_step: int, deterministic: bool
) -> None:
    """Oracle O1: the training forward pass over the whole sequence, float64."""
    config = EngineConfig(
        max_num_batched_tokens=tokens_per_step,
        max_num_seqs=4,
        block_size=8,
        deterministic=deterministic,
        debug=True,
    )
    core = EngineCore(tiny.model, config)
    seen = record_logits(core)
    prompts = tiny.make_prompts([1, 9, 40, 17, 8])
    sequences = [core.add(p, (GREEDY, SAMPLED)[i % 2]) for i, p in enumerate(prompts)]
    while core.has_work:
        core.step()
    assert len(set(sequences[1].output)) > 8
    for sequence in sequences:
        compare(sequence, seen, no_cache(tiny.model, sequence), FLOAT64)


def test_step_equals_recomputation_in_float32(tiny: SimpleNamespace) -> None:
    """Oracle O1 in the default dtype: same tokens, logits within float32 rounding."""
    model = tiny.make_model(torch.float32)
    core = EngineCore(model)
    seen = record_logits(core)
    prompts = tiny.make_prompts([5, 33, 60])
    sequences = [core.add(p, (SAMPLED, GREEDY)[i % 2]) for i, p in enumerate(prompts)]
    while core.has_work:
        core.step()
    for sequence in sequences:
        compare(sequence, seen, no_cache(model, sequence), FLOAT32)


@pytest.mark.parametrize("kind", [WindowPolicy, FirstComponentPolicy])
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("compress_prefill", [False, True])
def test_step_under_eviction_equals_masked_dense_attention(
    tiny: SimpleNamespace, kind: type[Policy], block_size: int, compress_prefill: bool
) -> None:
    """Oracle O2: all keys kept, evicted ones masked per layer and head; many compactions."""
    policy = kind(budget=13, interval=5, sinks=2, window=3, compress_prefill=compress_prefill)
    config = EngineConfig(block_size=block_size, max_num_batched_tokens=24, debug=True)
    core = EngineCore(tiny.model, config, policy)
    seen = record_logits(core)
    params = SamplingParams(seed=1, max_tokens=36)
    sequences = [core.add(prompt, params) for prompt in tiny.make_prompts([3, 17, 18, 19, 50])]
    while core.has_work:
        core.step()
    assert all(sequence.compactions >= 4 for sequence in sequences)
    for sequence in sequences:
        compare(sequence, seen, DenseCache(tiny.model, policy).generate(sequence), FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [WindowPolicy, FirstComponentPolicy])
def test_a_budget_beyond_the_length_changes_nothing(
    tiny: SimpleNamespace, kind: type[Policy], dtype: torch.dtype
) -> None:
    """Oracle O3: bit-identical logits to the full cache."""
    model = tiny.make_model(dtype)
    results = []
    for policy in (None, FullPolicy(), kind(budget=80, interval=4, window=8)):
        core = EngineCore(model, EngineConfig(block_size=8), policy)
        seen = record_logits(core)
        sequences = [core.add(prompt, SAMPLED) for prompt in tiny.make_prompts([7, 30, 60])]
        while core.has_work:
            core.step()
        results.append(([s.output for s in sequences], [torch.stack(r) for r in seen.values()]))
    for tokens, rows in results[1:]:
        assert tokens == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(rows, results[0][1], strict=True))


@pytest.mark.parametrize(
    "policy", [None, FirstComponentPolicy(budget=16, interval=6, sinks=2, window=4)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_do_not_depend_on_the_other_requests(
    tiny: SimpleNamespace, policy: Policy | None, dtype: torch.dtype
) -> None:
    """Oracle O5: solo runs; random arrivals, chunks, pools with preemption, aborts and seeds."""
    model, rng = tiny.make_model(dtype), random.Random(11)
    prompts = tiny.make_prompts([rng.randrange(1, 50) for _ in range(8)], seed=3)
    params = [
        SamplingParams(temperature=(0.0, 0.8, 1.2)[i % 3], top_p=0.95, seed=i, max_tokens=4 + 3 * i)
        for i in range(8)
    ]
    alone = [
        tiny.run_alone(model, p, q, policy).output for p, q in zip(prompts, params, strict=True)
    ]
    preemptions = 0
    for trial in range(3):
        config = EngineConfig(
            block_size=rng.choice((4, 8)),
            num_blocks=rng.choice((24, 40)),
            max_num_seqs=rng.choice((3, 8)),
            max_num_batched_tokens=rng.choice((8, 24, 500)),
            debug=True,
        )
        core = EngineCore(model, config, policy)
        order = rng.sample(range(8), 8)
        live: dict[int, Sequence] = {}
        while order or core.has_work:
            if order and rng.random() < 0.5:
                index = order.pop()
                live[index] = core.add(prompts[index], params[index])
                if trial % 2:
                    core.add(prompts[index][::-1], params[index], request_id="victim")
            core.step()
            core.abort("victim")
        for index, sequence in live.items():
            assert sequence.output == alone[index]
            preemptions += sequence.preemptions
        assert core.scheduler.blocks.num_free == config.num_blocks
    assert policy is not None or preemptions > 0


def test_deterministic_mode_is_bitwise_in_float32(tiny: SimpleNamespace) -> None:
    """Oracle O5 in float32: equal logits, bit for bit, alone and in a batch, under eviction."""
    model, policy = (
        tiny.make_model(torch.float32),
        FirstComponentPolicy(budget=16, interval=6, sinks=2, window=4),
    )
    config = EngineConfig(deterministic=True, max_num_batched_tokens=16, block_size=8)
    prompts = tiny.make_prompts([40, 3, 21, 16], seed=8)
    together = EngineCore(model, config, policy)
    seen = record_logits(together)
    sequences = [together.add(p, SAMPLED, request_id=str(i)) for i, p in enumerate(prompts)]
    while together.has_work:
        together.step()
    for index, prompt in enumerate(prompts):
        core = EngineCore(model, config, policy)
        solo = record_logits(core)
        sequence = core.add(prompt, SAMPLED, request_id="solo")
        while core.has_work:
            core.step()
        assert sequence.output == sequences[index].output
        assert torch.equal(torch.stack(solo["solo"]), torch.stack(seen[str(index)]))


def test_seeded_tokens_alone_and_among_sixteen_are_equal(tiny: SimpleNamespace) -> None:
    """Oracle O7: the same seed gives the same tokens; other seeds give other tokens."""
    prompt = tiny.make_prompts([12])[0]
    params = [SamplingParams(seed=seed, max_tokens=20) for seed in range(16)]
    core = EngineCore(tiny.model)
    sequences = [core.add(prompt, p) for p in params]
    while core.has_work:
        core.step()
    assert sequences[5].output == tiny.run_alone(tiny.model, prompt, params[5]).output
    assert len({tuple(sequence.output) for sequence in sequences}) == 16
    unseeded = [tiny.run_alone(tiny.model, prompt, SamplingParams(max_tokens=20)) for _ in range(2)]
    assert unseeded[0].output != unseeded[1].output
    again = SamplingParams(max_tokens=20, seed=unseeded[0].request.seed)
    assert tiny.run_alone(tiny.model, prompt, again).output == unseeded[0].output
