"""TriAttention's options against the direct definition: explicit positions, offsets and cosines."""

# Legend: L layers, R rows, K key/value heads, H query heads, S slots, D head width, F bands.

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from common.errors import BundleError
from common.models.rope import inverse_frequencies
from serve.decoder import LayerSpec
from serve.kv import CacheView, TriAttentionPolicy

EXACT = 1e-10
SHARED = os.environ.get("LIPLLM_SHARED_DATA")
REAL = ("ds_qwen7b_aime24", "ds_qwen7b_aime25", "qwen3_8b_aime24", "gpt_oss_120b")


def bands_of(x_D, spec):
    """Return the complex bands and the unrotated rest of a vector, in numpy-like steps."""
    width = 2 * spec.bands
    if spec.interleaved:
        return torch.complex(x_D[0:width:2], x_D[1:width:2]), x_D[width:]
    return torch.complex(x_D[: spec.bands], x_D[spec.bands : width]), x_D[width:]


def direct(view, policy, offsets, row, head, slot):
    """Score one slot by one query head: a sum of cosines for each offset, then the norm term."""
    spec, layer = view.spec, row // view.requests
    stats = {name: value[layer, head] for name, value in view.stats.items()}
    p = int(view.slot_positions()[row, head // spec.group, slot])
    t, s = int(view.positions_R[row]), spec.rope_scale
    cached_F, rest = bands_of(view.keys()[row, head // spec.group, slot], spec)
    frequency = spec.inverse_frequency
    # The key before RoPE: the cache holds it turned and scaled.
    key_F = cached_F / s * torch.polar(torch.ones_like(frequency), -frequency * p)
    centre_F = torch.complex(*stats["q_mean"].unbind(-1))
    phase_F = centre_F.angle() - key_F.angle()
    use_rest = policy.score_pass_through and len(rest)
    logits = []
    for offset in offsets:
        cosine_F = (frequency * (t - p + offset) + phase_F).cos()
        z = s**2 * float((centre_F.abs() * key_F.abs() * cosine_F).sum())
        z += float(stats["rest_mean"] @ rest) if use_rest else 0.0
        logits.append(spec.scale * z)
    if view.bias_LHT is not None:
        bias, context = view.bias_LHT[layer, head], view.context
        reach = [i for i, o in enumerate(offsets) if t - p + o < context]
        biases = {i: float(bias[t - p + offsets[i]]) for i in reach} or {0: float(bias[t - p])}
        if policy.aggregation == "max":
            return max(logits[i] + b for i, b in biases.items()) + norm_term(
                view, policy, stats, key_F, rest, use_rest
            )
        logits = [sum(logits) / len(logits) + sum(biases.values()) / len(biases)]
    total = max(logits) if policy.aggregation == "max" else sum(logits) / len(logits)
    return total + norm_term(view, policy, stats, key_F, rest, use_rest)


def norm_term(view, policy, stats, key_F, rest, use_rest):
    """Return the part that grows with the norm of the key."""
    spec, kind = view.spec, policy.norm_term
    s, mean_F = spec.rope_scale, stats["q_mean"].norm(dim=-1)
    if kind == "gaussian":
        total = s**4 * float(((stats["q_sq"] - mean_F**2) * key_F.abs() ** 2).sum())
        if use_rest:
            total += float((stats["rest_sq"] - stats["rest_mean"] ** 2) @ rest**2)
        return spec.scale**2 * total / 2
    weights = {
        "mlr": (stats["q_abs"] - mean_F, lambda: stats["rest_abs"] - stats["rest_mean"].abs()),
        "full": (stats["q_abs"], lambda: stats["rest_abs"]),
        "none": (torch.zeros_like(mean_F), lambda: torch.zeros_like(rest)),
    }[kind]
    total = s**2 * float((weights[0] * key_F.abs()).sum())
    total += float(weights[1]() @ rest.abs()) if use_rest else 0.0
    return spec.scale * total


def check(view, policy, offsets):
    """Compare raw scores on content heads with the direct definition."""
    raw, pos = policy.raw_scores(view), view.slot_positions()
    for row in range(len(pos)):
        for head in range(view.spec.content_heads):
            for slot in (pos[row, head // view.spec.group] >= 0).nonzero()[:, 0].tolist():
                expected = direct(view, policy, offsets, row, head, slot)
                assert abs(float(raw[row, head, slot]) - expected) < EXACT


@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("norm_term", ["mlr", "full", "none", "gaussian"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_equal_the_definition(cache, aggregation, norm_term, interleaved):
    """Oracle: the direct sum; partial RoPE with a scale, biases, unrotated components."""
    view = cache.make_view(cache.make_spec(interleaved=interleaved))
    policy = TriAttentionPolicy(aggregation=aggregation, norm_term=norm_term, offset_max=16)
    check(view, policy, [1, 2, 4, 8, 16])


@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("norm_term", ["mlr", "gaussian"])
def test_pass_through_and_full_rotation(cache, aggregation, norm_term):
    """Oracle: the direct sum without the unrotated components, and where there are none."""
    options = {"aggregation": aggregation, "norm_term": norm_term}
    policy = TriAttentionPolicy(score_pass_through=False, **options)
    check(cache.make_view(cache.make_spec(with_bias=False)), policy, [2**i for i in range(7)])
    full = cache.make_view(cache.make_spec(bands=5))
    check(full, TriAttentionPolicy(**options), [2**i for i in range(7)])


def test_the_last_query_of_the_context_still_scores(cache):
    """Oracle: the direct sum where no offset, or only the first, stays inside the context."""
    view = cache.make_view(cache.make_spec())
    view = dataclasses.replace(view, context=42, bias_LHT=view.bias_LHT[:, :, :42])
    for aggregation in ("mean", "max"):
        check(view, TriAttentionPolicy(aggregation=aggregation), [1, 2, 4, 8, 16, 32])


@pytest.mark.parametrize("group", ["max", "mean"])
def test_scores_without_normalization_are_combined_as_they_are(cache, group):
    """Oracle: the raw scores of a group, combined by hand."""
    view = cache.make_view(cache.make_spec())
    policy = TriAttentionPolicy(normalize=False, group=group)
    raw, score = policy.raw_scores(view), policy.score(view)
    first, second = raw[:, 0::2], raw[:, 1::2]
    expected = torch.maximum(first, second) if group == "max" else (first + second) / 2
    filled = view.slot_positions() >= 0
    assert float((score - expected)[filled].abs().max()) < EXACT


def test_missing_statistics_of_the_rest_are_named(cache):
    """Oracle: the error contract."""
    view = cache.make_view(cache.make_spec())
    for name, options in (("rest_mean", {}), ("q_sq", {"norm_term": "gaussian"})):
        stats = {key: value for key, value in view.stats.items() if key != name}
        with pytest.raises(BundleError, match=f"lack {name}"):
            TriAttentionPolicy(**options).score(dataclasses.replace(view, stats=stats))


@pytest.mark.skipif(not SHARED, reason="LIPLLM_SHARED_DATA names no folder of real statistics")
@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("name", REAL)
def test_real_statistics(name, aggregation):
    """Oracle: the direct sum with the query centres of published models, at long positions."""
    path = Path(str(SHARED)) / "triattention_stats" / f"{name}.pt"
    stored = torch.load(path, weights_only=True)["stats"]
    heads = [stored[key] for key in list(stored)[:: len(stored) // 7][:6]]
    width = 2 * len(heads[0]["q_abs_mean"])
    theta = {"ds": 1e4, "qw": 1e6, "gp": 1.5e5}[name[:2]]
    spec = LayerSpec(
        heads=6, kv_heads=3, head_dim=width, content_heads=6, scale=width**-0.5,
        inverse_frequency=inverse_frequencies(width, theta),
    )  # fmt: skip
    pairs = [torch.stack((h["q_mean_real"], h["q_mean_imag"]), -1) for h in heads]
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 3, 16, width, generator=generator, dtype=torch.float64)
    pos = torch.randperm(30_000, generator=generator)[:16].int().expand(1, 3, -1).contiguous()
    view = CacheView(
        layers=(0,),
        spec=spec,
        bias_LHT=None,
        context=1 << 17,
        k_pool=keys,
        v_pool=keys,
        pos_pool=pos,
        tables_RN=torch.zeros(1, 1, dtype=torch.long),
        lengths_R=torch.tensor([16]),
        positions_R=torch.tensor([30_011]),
        prompts_R=torch.tensor([1]),
        seeds_R=torch.tensor([0]),
        stats={
            "q_mean": torch.stack(pairs)[None].double(),
            "q_abs": torch.stack([h["q_abs_mean"] for h in heads])[None].double(),
        },
    )
    check(view, TriAttentionPolicy(aggregation=aggregation), [2**i for i in range(17)])
