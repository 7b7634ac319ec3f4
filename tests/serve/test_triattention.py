"""Closed-form scores against the published definition: explicit positions, offsets and cosines."""

import os
from pathlib import Path

import pytest
import torch

from common.errors import BundleError, ConfigError
from common.models import LayerConfig
from common.models.rope import inverse_frequencies, rotate, rotation
from serve.decoder import LayerSpec
from serve.kv import CacheView, TriAttentionPolicy
from serve.kv.policies.triattention import (
    mean_future_bias,
    norm_weights,
    query_form,
    query_offsets,
)
from serve.kv.selection import standardize

IDENTITY = 1e-10  # float64, scores up to a few dozen, phases up to 1e5 radians
SINGLE = 2e-5  # float32 scores of size one
SHARED = os.environ.get("LIPLLM_SHARED_DATA")


def layer_config(**changes):
    """Settings of one layer with two KV heads and a group of two."""
    fields = {
        "heads": 4,
        "kv_heads": 2,
        "content_heads": 4,
        "head_dim": 8,
        "mlp_width": 4,
        "activation": "relu",
        "gelu_divisor": 1.0,
        "mlp_bias": False,
        "position_bias": False,
        "attn_residual": 0.5,
        "mlp_residual": 0.5,
        "attn_factor": 1.0,
        "softmax_scale": 2.0,
    }
    return LayerConfig(**(fields | changes))


def direct_score(q_mean_F2, q_abs_F, key_D, frequency_F, t, p, offsets):
    """The published formula: 17 offsets, moduli, phases and cosines of one unrotated key."""
    bands = len(frequency_F)
    key_F = torch.complex(key_D[:bands], key_D[bands:])
    centre_F = torch.complex(q_mean_F2[:, 0], q_mean_F2[:, 1])
    phase_F = centre_F.angle() - key_F.angle()
    norm = ((q_abs_F - centre_F.abs()) * key_F.abs()).sum()
    total = 0.0
    for offset in offsets:
        turn_F = frequency_F * (t - p + offset) + phase_F
        total += (centre_F.abs() * key_F.abs() * turn_F.cos()).sum() + norm
    return total / len(offsets)


def make_view(config, *, lengths, context=64, dtype=torch.float64, seed=0, gap=9):
    """One page per row holding random keys rotated at random increasing positions."""
    generator = torch.Generator().manual_seed(seed)
    rows, slots, width = len(lengths), max(lengths) + 1, config.head_dim
    frequency = inverse_frequencies(width, 100.0)
    shape = (rows, config.kv_heads, slots)
    keys = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
    keys[:, config.content_kv_heads :] = 0
    pos = torch.stack(
        [
            torch.randperm(slots + gap, generator=generator)[:slots].sort().values
            for _ in range(rows)
        ]
    )
    pos = pos[:, None].expand(shape).contiguous()
    lengths_R = torch.tensor(lengths)
    newest_R = pos[torch.arange(rows), 0, lengths_R - 1]
    rotated = rotate(keys, rotation(pos[:, 0], frequency, torch.float64))
    bands, heads = width // 2, config.content_heads
    q_mean = torch.randn(heads, bands, 2, generator=generator, dtype=torch.float64)
    stats = {"q_mean": q_mean, "q_abs": q_mean.norm(dim=-1) * 1.3, "inv_freq": frequency}
    bias = torch.randn(config.heads, context, generator=generator, dtype=torch.float64)
    spec = LayerSpec(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=width,
        content_heads=config.content_heads,
        scale=config.logit_scale,
        inverse_frequency=frequency,
        bias_HT=bias if config.position_bias else None,
    )
    view = CacheView(
        layers=(0,),
        spec=spec,
        context=context,
        bias_LHT=bias[None] if config.position_bias else None,
        k_pool=rotated.to(dtype),
        v_pool=torch.zeros(*shape, width, dtype=dtype),
        pos_pool=pos.int(),
        tables_RN=torch.arange(rows, dtype=torch.int32)[:, None],
        lengths_R=lengths_R,
        positions_R=newest_R + 1,
        prompts_R=newest_R + 1,
        seeds_R=torch.zeros_like(newest_R),
        stats={name: x[None] for name, x in stats.items()} if heads else None,
    )
    return view, keys


def direct_raw(view, keys, offsets, row, head, slot):
    """Scaled published score plus the mean of the reachable biases, for one slot."""
    config, t = view.spec, int(view.positions_R[row])
    p = int(view.pos_pool[row, head // config.group, slot])
    expected = 0.0
    if head < config.content_heads:
        stats, key = view.stats, keys[row, head // config.group, slot]
        args = (stats["q_mean"][0, head], stats["q_abs"][0, head], key, config.inverse_frequency)
        expected = config.scale * direct_score(*args, t, p, offsets)
    if view.bias_LHT is not None:
        reachable = [t - p + o for o in offsets if t - p + o < view.context] or [t - p]
        expected += sum(float(view.bias_LHT[0, head, d]) for d in reachable) / len(reachable)
    return float(expected)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("offset_max", [1, 16, 65536])
def test_scores_equal_the_published_definition(group, offset_max):
    """Oracle: the direct sum over offsets of cosines, from unrotated keys, in float64."""
    config = layer_config(heads=2 * group, content_heads=2 * group, head_dim=12)
    view, keys = make_view(config, lengths=[11, 5])
    policy = TriAttentionPolicy(budget=8, sinks=0, window=1, offset_max=offset_max)
    offsets = [2**i for i in range(17) if 2**i <= offset_max]
    raw = policy.raw_scores(view)
    assert raw.dtype == torch.float64
    for row, length in enumerate([11, 5]):
        for head in range(2 * group):
            for slot in range(length):
                expected = direct_raw(view, keys, offsets, row, head, slot)
                assert abs(float(raw[row, head, slot]) - expected) < IDENTITY


@pytest.mark.parametrize("content_heads", [0, 2, 4])
def test_bias_enters_as_its_mean_over_reachable_distances(content_heads):
    """Oracle: the direct mean over offsets; positional heads have the bias alone."""
    config = layer_config(position_bias=True, content_heads=content_heads)
    view, keys = make_view(config, lengths=[20, 12], context=32)
    assert int(view.positions_R.max()) <= 32
    policy = TriAttentionPolicy(budget=8, sinks=0, window=1)
    raw = policy.raw_scores(view).double()
    tolerance = IDENTITY if content_heads else SINGLE
    for row, length in enumerate([20, 12]):
        for head in range(4):
            for slot in range(length):
                expected = direct_raw(view, keys, [1, 2, 4, 8, 16, 32], row, head, slot)
                assert abs(float(raw[row, head, slot]) - expected) < tolerance


def test_final_score_is_the_largest_z_score_of_the_group():
    """Oracle: mean and population deviation of the evictable slots, head by head."""
    config = layer_config(position_bias=True)
    view, keys = make_view(config, lengths=[20])
    policy = TriAttentionPolicy(budget=12, sinks=3, window=5)
    offsets, t = [2**i for i in range(7)], int(view.positions_R[0])
    got = policy.score(view)[0]
    for kv_head in range(2):
        best = torch.full((20,), -torch.inf, dtype=torch.float64)
        for head in (2 * kv_head, 2 * kv_head + 1):
            rows = [direct_raw(view, keys, offsets, 0, head, slot) for slot in range(20)]
            raw = torch.tensor(rows, dtype=torch.float64)
            pos = view.pos_pool[0, kv_head, :20]
            free = raw[(pos >= 3) & (pos < t - 5)]
            best = best.maximum((raw - free.mean()) / free.std(correction=0))
        assert float((got[kv_head, :20] - best).abs().max()) < IDENTITY


def test_float32_cache_matches_float64_at_long_positions():
    """Oracle: the float64 form of the same keys; phases never pass through float32."""
    frequency = inverse_frequencies(16, 1e6)
    q_mean = torch.randn(3, 8, 2, dtype=torch.float64)
    t = torch.tensor([1_000_003])
    u = query_form(q_mean, frequency, t, query_offsets(None, 1 << 20))
    key = torch.randn(16, dtype=torch.float64)
    near = (u[0].float() @ key.float()).double()
    assert float((near - u[0] @ key).abs().max()) < SINGLE


def test_norm_terms_and_their_weights():
    """Oracle: the definitions of the published term and of its two ablations."""
    q_mean = torch.tensor([[[3.0, 4.0]]])
    q_abs = torch.tensor([[7.0]])
    assert norm_weights(q_mean, q_abs, "mlr").item() == 2.0
    assert norm_weights(q_mean, q_abs, "full").item() == 7.0
    assert norm_weights(q_mean, q_abs, "none").item() == 0.0


def test_equal_scores_standardize_to_zero():
    """Oracle: the rule for a vanishing deviation; a lone candidate is the extreme case."""
    raw = torch.full((1, 1, 2, 5), 3.0)
    candidates = torch.tensor([[[True, True, False, True, False]]])
    assert bool((standardize(raw, candidates) == 0).all())
    assert bool((standardize(raw, torch.zeros_like(candidates)) == 0).all())


def test_unreachable_distances_fall_back_to_the_next_query():
    """Oracle: the last distances of the table, where no offset stays inside the context."""
    bias = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    table = mean_future_bias(bias, torch.tensor([1, 2, 4]))
    assert table.tolist() == [[3.0, 6.0, 8.0, 8.0, 8.0]]


def test_offsets_follow_the_context():
    """Oracle: the published set for long contexts, the project's rule for short ones."""
    assert query_offsets(None, 10**6).tolist() == [2**i for i in range(17)]
    assert query_offsets(None, 100).tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert query_offsets(5, 100).tolist() == [1, 2, 4]


def test_missing_statistics_and_bad_options_are_one_line():
    """Oracle: the error contract."""
    view, _ = make_view(layer_config(), lengths=[4])
    bare = CacheView(**{name: getattr(view, name) for name in view.__slots__} | {"stats": None})
    with pytest.raises(BundleError, match="lipllm calibrate"):
        TriAttentionPolicy().score(bare)
    with pytest.raises(ConfigError, match=r"kv\.offset_max"):
        TriAttentionPolicy(offset_max=0)
    with pytest.raises(ConfigError, match="norm_term"):
        TriAttentionPolicy(norm_term="gauss")
    with pytest.raises(ConfigError, match=r"kv\.budget=null"):
        TriAttentionPolicy(budget=None)


@pytest.mark.skipif(not SHARED, reason="LIPLLM_SHARED_DATA names no folder of real statistics")
@pytest.mark.parametrize(("name", "theta"), [("ds_qwen7b_aime24", 1e4), ("qwen3_8b_aime24", 1e6)])
def test_identity_holds_on_real_statistics(name, theta):
    """Oracle: the direct 17-offset sum with the query centres of published models."""
    path = Path(str(SHARED)) / "triattention_stats" / f"{name}.pt"
    stats = torch.load(path, weights_only=True)["stats"]
    frequency = inverse_frequencies(128, theta)
    offsets = query_offsets(None, 1 << 17)
    for index, head in enumerate(list(stats.values())[:: len(stats) // 12]):
        q_mean = torch.stack((head["q_mean_real"], head["q_mean_imag"]), -1).double()
        q_abs = head["q_abs_mean"].double()
        t, p = 30_000 + index, 17 * index
        key = torch.randn(128, dtype=torch.float64)
        turned = rotate(key.view(1, 1, 1, -1), rotation(torch.tensor([[p]]), frequency, key.dtype))
        u = query_form(q_mean[None], frequency, torch.tensor([t]), offsets)[0, 0]
        e = norm_weights(q_mean[None], q_abs[None], "mlr")[0]
        closed = u @ turned.flatten() + e @ torch.hypot(key[:64], key[64:])
        direct = direct_score(q_mean, q_abs, key, frequency, t, p, offsets.tolist())
        # Real queries have norms up to 200, so the comparison is relative to the head's size.
        assert abs(float(closed - direct)) < IDENTITY * (1 + float(q_abs.norm() * key.norm()))
