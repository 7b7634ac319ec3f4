"""Physically smaller models."""

import pytest
import torch

from common.errors import ShapeError
from common.models.config import ACTIVATIONS
from compress.surgery import shrink
from compress.targets import block_indices, mlp_targets

DOUBLE = 1e-12
"""Float64 sums with some zero terms left out."""


def choose(model, fraction: float, seed: int = 0) -> list[torch.Tensor]:
    """Return random kept neurons per layer: whole components, another count in each layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for target in mlp_targets(model.config):
        count = max(1, round(fraction * target.components) - target.layer)
        chosen = torch.randperm(target.components, generator=generator)[:count].sort().values
        kept.append(block_indices(chosen, target.unit))
    return kept


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_smaller_model_equals_the_masked_one(make_model, activation, bias):
    """Oracle: the dense model with the removed columns of the down projections set to zero."""
    model = make_model(activation, bias=bias)
    kept = choose(model, 0.6)
    tokens_BT = torch.arange(32).reshape(2, 16) % 11
    small = shrink(
        model, kept, [lay.mlp.down.weight[:, k] for lay, k in zip(model.layers, kept, strict=True)]
    )
    with torch.no_grad():
        for layer, kept_K in zip(model.layers, kept, strict=True):
            mask = torch.zeros(layer.mlp.down.in_features, dtype=torch.bool)
            mask[kept_K] = True
            layer.mlp.down.weight[:, ~mask] = 0
        torch.testing.assert_close(small(tokens_BT), model(tokens_BT), rtol=DOUBLE, atol=DOUBLE)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_keeping_everything_is_bit_identical(make_model, activation):
    """In single precision, as models are stored."""
    model = make_model(activation).float()
    everything = [torch.arange(layer.mlp.down.in_features) for layer in model.layers]
    down = [layer.mlp.down.weight.detach().double() for layer in model.layers]
    same = shrink(model, everything, down)
    tokens_BT = torch.arange(32).reshape(2, 16) % 11
    assert same.config == model.config
    assert torch.equal(same(tokens_BT), model(tokens_BT))


def test_parameter_count_matches_the_targets(make_model):
    """Oracle: the cost that the allocator charges per component."""
    for activation, bias in (("maxmin", True), ("relu", False)):
        model = make_model(activation, bias=bias)
        kept = choose(model, 0.5)
        down = [lay.mlp.down.weight[:, k] for lay, k in zip(model.layers, kept, strict=True)]
        small = shrink(model, kept, down)
        gone = sum(
            target.cost * (target.components - len(kept_K) // target.unit)
            for target, kept_K in zip(mlp_targets(model.config), kept, strict=True)
        )
        assert model.num_parameters - small.num_parameters == gone
        assert [small.config.layer(i).mlp_width for i in range(2)] == [len(k) for k in kept]


def test_nothing_else_changes(make_model):
    """The dense model, the random state, gradient flags and the other tensors stay."""
    model = make_model("relu")
    model.layers[0].mlp.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = choose(model, 0.5)
    state = torch.random.get_rng_state()
    down = [torch.zeros(8, len(kept_K)) for kept_K in kept]
    bias = [torch.ones(8), None]
    small = shrink(model, kept, down, bias)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not small.layers[0].mlp.up.weight.requires_grad
    assert small.layers[1].mlp.up.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if "mlp" not in name:
            assert torch.equal(small.state_dict()[name], tensor)
    assert torch.equal(small.layers[0].mlp.down.bias, torch.ones(8, dtype=torch.float64))
    assert torch.equal(small.layers[1].mlp.down.bias, model.layers[1].mlp.down.bias)


def test_a_projection_of_the_wrong_shape_is_named(make_model):
    """The message names the layer and both shapes."""
    model = make_model("relu")
    kept = choose(model, 0.5)
    down = [torch.zeros(8, len(kept[0])), torch.zeros(8, 3)]
    with pytest.raises(ShapeError, match=r"layer 1: down projection \(8, 3\)"):
        shrink(model, kept, down)
