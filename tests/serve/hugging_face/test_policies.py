"""Evicting from models of ``transformers``: masks of the model itself show what evicting means."""

import pytest
import torch

from serve.engine.config import EngineConfig
from serve.engine.engine import EngineCore
from serve.engine.sampling_params import SamplingParams
from serve.hugging_face import HuggingFaceDecoder
from serve.kv import POLICIES, TriAttentionPolicy, WindowPolicy
from serve.kv.calibrate import calibrate, layer_stats

CLOSE = 1e-4  # float32 logits of size ten, other matrix shapes
PARAMS = SamplingParams(temperature=0.0, max_tokens=40)
BUDGET = {"budget": 16, "interval": 4, "sinks": 2, "window": 6, "protect_prompt": False}


def stats_of(hf, decoder):
    """Statistics of random text, by layer."""
    tokens = torch.tensor(hf.make_prompts([64] * 4, seed=5))
    return layer_stats(calibrate(decoder, [tokens]), decoder)


def watched(decoder, prompt, policy, stats=None):
    """Run one prompt; return tokens, logits per position, and what each query could see.

    The last is (layers, heads, tokens, tokens), bool: the original positions in the cache of each
    layer and key/value head when the query ran, and the query's own.
    """
    core = EngineCore(decoder, EngineConfig(debug=True), policy, stats)
    sequence, logits = core.add(prompt, PARAMS), {}
    forward = core.runner.forward

    def recording(items, **options):
        rows = forward(items, **options)
        logits[sequence.num_tokens + items[0].count - 1] = rows[0]
        return rows

    core.runner.forward = recording
    total = len(prompt) + PARAMS.max_tokens
    spec = decoder.layers[0]
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    seen = seen.repeat(len(decoder.layers), spec.kv_heads, 1, 1)
    while core.has_work:
        core_positions = []
        if sequence.kv_len:
            table = torch.tensor(sequence.block_table)
            for pool in core.runner.pools.layers:
                slots = pool.positions[table].transpose(0, 1).flatten(1)[:, : sequence.kv_len]
                core_positions.append(slots.long())
            query = sequence.num_tokens
            seen[:, :, query] = False
            seen[:, :, query, query] = True
            seen[:, :, query].scatter_(2, torch.stack(core_positions), True)
        core.step()
    assert sequence.finish_reason == "length"
    return sequence, logits, seen


@pytest.mark.parametrize("name", ["llama", "yarn", "qwen3", "glm"])
def test_evicting_equals_masking_in_the_model(hf, name):
    """Oracle: the stock model over the whole text with a 4D mask; sets by the window's rule."""
    model = hf.make_model(name)
    prompt = hf.make_prompts([21])[0]
    sequence, logits, seen = watched(HuggingFaceDecoder(model), prompt, WindowPolicy(**BUDGET))
    assert bool((seen == seen[:1, :1]).all())
    mask = seen[0, 0]
    assert not mask[40, 10]
    assert mask[40, [0, 1, 39, 40]].all()
    tokens = torch.tensor([sequence.tokens])
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    count = tokens.shape[1]
    masked = model(tokens, attention_mask=additive[None, None, :count, :count]).logits[0]
    full = model(tokens).logits[0]
    assert sorted(logits) == list(range(20, count - 1))
    worst = max(float((logits[p] - masked[p]).abs().max()) for p in logits)
    assert worst < CLOSE
    assert max(float((logits[p] - full[p]).abs().max()) for p in logits) > 100 * CLOSE


@pytest.mark.parametrize("name", ["llama", "phi3", "smollm3"])
def test_sets_per_head_equal_masking_per_head(hf, name):
    """Oracle: the stock model with eager attention whose mask differs by layer and head."""
    from transformers import AttentionInterface

    model = hf.make_model(name)
    decoder = HuggingFaceDecoder(model)
    prompt = hf.make_prompts([21])[0]
    policy = TriAttentionPolicy(**BUDGET)
    sequence, logits, seen = watched(decoder, prompt, policy, stats_of(hf, decoder))
    assert not bool((seen == seen[:1]).all())
    assert not bool((seen == seen[:, :1]).all())
    count = len(sequence.tokens)

    def eager(module, query, key, value, mask, scaling, **options):
        group = query.shape[1] // key.shape[1]
        key, value, keep = (
            x.repeat_interleave(group, dim=1)
            for x in (key, value, seen[module.layer_idx, None, :, :count, :count])
        )
        weights = (scaling * query @ key.mT).masked_fill(~keep, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("masked_by_head", eager)
    model.set_attn_implementation("masked_by_head")
    masked = model(torch.tensor([sequence.tokens])).logits[0]
    assert max(float((logits[p] - masked[p]).abs().max()) for p in logits) < CLOSE


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", ["glm", "qwen2_mixed"])
def test_every_policy_runs_alike_alone_and_in_a_batch(hf, name, policy):
    """Oracle: solo runs; the cache shrinks as the budget says."""
    decoder = HuggingFaceDecoder(hf.make_model(name, torch.float64))
    kind = POLICIES[policy]
    chosen = kind(**({} if policy == "full" else BUDGET))
    stats = stats_of(hf, decoder) if chosen.needs_stats else None
    prompts = hf.make_prompts([21, 7, 33])
    params = SamplingParams(temperature=0.0, max_tokens=20, seed=3)
    together = hf.run(decoder, prompts, chosen, stats, params)
    alone = [hf.run(decoder, [prompt], chosen, stats, params)[0] for prompt in prompts]
    assert [s.output for s in together] == [s.output for s in alone]
    assert all(s.finish_reason == "length" for s in together)
    assert (together[2].kept_fraction < 0.6) == (policy != "full")


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_prefix_cache_changes_nothing(hf, name):
    """Oracle: the same requests without a prefix cache; the second prompt shares two blocks."""
    decoder = HuggingFaceDecoder(hf.make_model(name, torch.float64))
    first = hf.make_prompts([45])[0]
    prompts = [first, first[:34] + hf.make_prompts([9], seed=1)[0]]
    policy = WindowPolicy(**(BUDGET | {"budget": 32}))
    found = {}
    for prefix_caching in (False, True):
        core = EngineCore(decoder, EngineConfig(prefix_caching=prefix_caching, debug=True), policy)
        outputs = []
        for prompt in prompts:
            outputs.append(core.add(prompt, PARAMS))
            while core.has_work:
                core.step()
        found[prefix_caching] = [sequence.output for sequence in outputs]
        cached = [sequence.num_hit for sequence in outputs]
        assert cached == ([0, 32] if prefix_caching else [0, 0])
    assert found[True] == found[False]
