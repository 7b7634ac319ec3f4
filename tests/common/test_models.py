"""The transformer against a written-out float64 oracle, over all freedoms of its configuration."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.models.layers import activate
from common.models.rope import inverse_frequencies, rotate, rotation

# Both sides run in float64 on a few dozen terms.
EXACT = 1e-12

FREEDOMS = {
    "paper": {},
    "all": {
        "kv_heads": 2,
        "content_heads": 2,
        "position_bias": True,
        "activation": "maxmin",
        "mlp_bias": True,
        "head_bias": True,
        "attn_residual": 0.5,
        "mlp_residual": (0.3, 0.9),
        "attn_factor": 0.7,
        "softmax_scale": 3.0,
        "final_scale": 2.0,
        "mlp_width": (10, 24),
    },
    "positional": {"content_heads": 0, "position_bias": True, "activation": "abs"},
    "uneven": {"heads": (4, 2), "kv_heads": (2, 2), "head_dim": (4, 6), "activation": "relu"},
    "tanh": {"activation": ("gelu_tanh", "tanh"), "kv_heads": 1},
    "silu": {"activation": "silu", "mlp_bias": True},
    "means": {"softmax_scale": 0.0},
}


def _model(name: str) -> LipschitzTransformer:
    torch.manual_seed(0)
    settings = {"vocab_size": 7, "width": 16, "layers": 2, "heads": 4, "context": 9}
    model = LipschitzTransformer(ModelConfig(**(settings | FREEDOMS[name]))).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def _oracle_attention(attention, x_TC):
    """Per query, head and key with plain loops; complex numbers for RoPE."""
    layer, out = attention.layer, []
    frequency = inverse_frequencies(layer.head_dim, 10000.0)

    def rotated(vector, position):
        half = layer.head_dim // 2
        return torch.complex(vector[:half], vector[half:]) * torch.exp(1j * position * frequency)

    for i in range(x_TC.shape[0]):
        heads = []
        for h in range(layer.heads):
            g, d = h // layer.group, layer.head_dim
            logits = []
            for j in range(i + 1):
                logit = torch.zeros((), dtype=torch.float64)
                if h < layer.content_heads:
                    q = rotated(attention.query.weight[h * d : (h + 1) * d] @ x_TC[i], i)
                    k = rotated(attention.key.weight[g * d : (g + 1) * d] @ x_TC[j], j)
                    logit = layer.softmax_scale / d * (q * k.conj()).real.sum()
                if layer.position_bias:
                    logit = logit + attention.position_bias[h, i - j]
                logits.append(logit)
            weights = torch.stack(logits).softmax(0)
            values = x_TC[: i + 1] @ attention.value.weight[g * d : (g + 1) * d].T
            heads.append(weights @ values)
        out.append(layer.attn_factor * attention.output.weight @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize("name", FREEDOMS)
@torch.no_grad()
def test_forward_equals_written_out_definition(name):
    """Oracle: loops over queries, heads and keys with complex rotations, in float64."""
    model = _model(name)
    tokens = torch.randint(0, 7, (1, 9))
    x = model.embed(tokens)[0]
    for layer in model.layers:
        a, b = layer.layer.attn_residual, layer.layer.mlp_residual
        x = (1 - a) * x + a * _oracle_attention(layer.attention, x)
        x = (1 - b) * x + b * layer.mlp.down(activate(layer.mlp.up(x), layer.layer))
    expected = model.config.final_scale * x @ model.head.weight.T
    if model.head.bias is not None:
        expected = expected + model.head.bias
    torch.testing.assert_close(model(tokens)[0], expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("name", FREEDOMS)
@torch.no_grad()
def test_explicit_positions_equal_the_default(name):
    """Oracle: the default path; the order of tokens in memory must not matter either."""
    model, tokens = _model(name), torch.randint(0, 7, (2, 9))
    default = model(tokens)
    positions = torch.arange(9)[None]
    torch.testing.assert_close(model(tokens, positions), default, atol=EXACT, rtol=EXACT)
    order = torch.randperm(9)
    shuffled = model(tokens[:, order], positions[:, order])
    torch.testing.assert_close(shuffled, default[:, order], atol=EXACT, rtol=EXACT)


@torch.no_grad()
def test_attend_hook_sees_every_layer_and_its_result_is_used():
    """Oracle: zero head outputs leave only the skip path of each attention block."""
    model, seen = _model("all"), []

    def attend(index, q, k, v):
        seen.append((index, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return torch.zeros_like(q)

    x = model.embed(torch.randint(0, 7, (1, 5)))
    result = model.stream(x, attend=attend)
    for layer in model.layers:
        x = layer.mlp_block((1 - layer.layer.attn_residual) * x)
    torch.testing.assert_close(result, x, atol=EXACT, rtol=EXACT)
    assert seen == [(i, (1, 4, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)) for i in range(2)]


def test_rotation_preserves_norms_and_depends_on_distance_only():
    """Oracle: rotations are orthogonal and q.k depends on i - j."""
    frequency = inverse_frequencies(8, 10000.0)
    q, k = torch.randn(2, 1, 1, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 7]])

    def product(shift):
        cos_sin = rotation(positions + shift, frequency, torch.float64)
        return rotate(q, cos_sin) @ rotate(k, cos_sin).mT

    torch.testing.assert_close(product(0), product(100), atol=1e-10, rtol=1e-10)
    turned = rotate(q, rotation(positions, frequency, torch.float64))
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), atol=EXACT, rtol=EXACT)


def test_maxmin_sorts_neighbouring_pairs():
    """Oracle: sorting each pair in descending order."""
    z = torch.randn(5, 12)
    layer = ModelConfig(
        vocab_size=2, width=4, layers=1, heads=1, context=2, activation="maxmin"
    ).layer(0)
    expected = z.unflatten(-1, (6, 2)).sort(-1, descending=True).values.flatten(-2)
    assert torch.equal(activate(z, layer), expected)


def test_config_round_trips_and_counts_the_papers_parameters():
    """Oracle: 2,392,576 parameters of the published Shakespeare model."""
    config = ModelConfig(vocab_size=65, width=256, layers=3, heads=4, context=256)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert LipschitzTransformer(config).num_parameters == 2_392_576
    assert config.layer(0).attn_residual == pytest.approx(1 / 6)
    assert config.with_layer(1, mlp_width=512).mlp_width == (1024, 512, 1024)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"width": -1}, "width=-1"),
        ({"width": "x"}, "width='x'"),
        ({"heads": 3}, "width=16"),
        ({"heads": (4, 4, 4)}, "one per layer"),
        ({"attn_residual": 1.5}, "attn_residual=1.5"),
        ({"activation": "swish"}, "swish"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 2, "content_heads": 1}, "content_heads=1"),
        ({"activation": "maxmin", "mlp_width": 7}, "mlp_width=7"),
        ({"final_scale": math.nan}, "final_scale"),
    ],
)
def test_impossible_settings_name_field_and_value(changes, word):
    """Each mistake is one line that names the value."""
    settings = {"vocab_size": 7, "width": 16, "layers": 2, "heads": 4, "context": 9}
    with pytest.raises(ConfigError, match=word) as error:
        ModelConfig(**(settings | changes))
    assert "\n" not in str(error.value)


def test_sequence_longer_than_context_is_refused():
    """A longer sequence would leave the position table."""
    with pytest.raises(ShapeError, match="context of 9"):
        _model("paper")(torch.zeros(1, 10, dtype=torch.long))


def test_classifier_applies_activations_between_layers_only():
    """Oracle: the formula of a two-layer network."""
    model = LipschitzMLP((5, 4, 3), activation="abs").double()
    x = torch.randn(6, 5, dtype=torch.float64)
    first, last = model.linears
    expected = last((x @ first.weight.T + first.bias).abs())
    torch.testing.assert_close(model(x), expected, atol=EXACT, rtol=EXACT)
    with pytest.raises(ConfigError, match="sizes"):
        LipschitzMLP((5,))
