"""Initial weights and biases: the SVD and closed forms are the oracles."""

import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from train.groups import Constraint, role
from train.init import InitConfig, freeze_unused, initialise, initialise_biases


def transformer(**changes):
    """A small model with every kind of parameter."""
    settings = {"vocab_size": 7, "width": 8, "layers": 2, "heads": 4, "context": 12}
    settings |= {"content_heads": 1, "mlp_bias": True, "position_bias": True, "head_bias": True}
    return LipschitzTransformer(ModelConfig(**(settings | changes)))


def test_matrices_are_orthogonal_with_unit_norm_or_their_cap():
    """Oracle: all singular values equal min(1, cap) in RMS->RMS units."""
    model = transformer()
    initialise(model, Constraint(caps={"query": 0.25, "up": 3.0}), seed=0)
    for name, w in model.named_parameters():
        kind = role(name)
        if kind in ("query", "key", "value", "up"):
            sigma = (w.shape[1] / w.shape[0]) ** 0.5 * torch.linalg.svdvals(w.detach())
            expected = 0.25 if kind == "query" else 1.0
            torch.testing.assert_close(sigma, torch.full_like(sigma, expected))


def test_only_blocks_that_are_left_out_are_frozen():
    """Oracle: autograd: what stays asks for a gradient and gets one."""
    model = transformer(attn_residual=(0.5, 0.0), mlp_residual=(0.0, 1.0))
    freeze_unused(model)
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    for name, p in model.named_parameters():
        is_out = name.startswith(("layers.1.attention.", "layers.0.mlp."))
        assert p.requires_grad == (p.grad is not None) == (not is_out)


def test_outputs_start_at_zero_and_embedding_rows_at_unit_rms():
    """Oracle: closed form; the model starts as shrinkage and the head bias alone."""
    model = transformer()
    initialise(model, Constraint(), seed=0)
    for name, w in model.named_parameters():
        if role(name) in ("output", "down", "head", "vector"):
            assert not w.any()
    rms = model.embedding.weight.detach().square().mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.ones(7))
    x = model.embed(torch.arange(7)[None]).detach()
    torch.testing.assert_close(model.stream(x).detach(), x * (1 - 1 / 4) ** 4)


def test_same_seed_same_weights_whatever_the_global_state():
    """Oracle: bitwise equality; another seed differs."""
    first, second, third = transformer(), transformer(), transformer()
    initialise(first, Constraint(), seed=3)
    torch.rand(5)
    initialise(second, Constraint(), seed=3)
    initialise(third, Constraint(), seed=4)
    assert torch.equal(first.layers[0].mlp.up.weight, second.layers[0].mlp.up.weight)
    assert not torch.equal(first.layers[0].mlp.up.weight, third.layers[0].mlp.up.weight)


def test_classifier_can_learn_from_the_start():
    """Property: the zero last layer leaves a gradient on itself (a zero first one would not)."""
    model = LipschitzMLP((5, 6, 6, 3), bias=False)
    initialise(model, Constraint(), seed=0)
    assert not model.linears[-1].weight.any()
    torch.nn.functional.cross_entropy(model(torch.rand(4, 5)), torch.arange(4) % 3).backward()
    assert model.linears[-1].weight.grad.any()


def test_head_bias_is_the_unigram_log_probability():
    """Oracle: closed form with add-one smoothing; the untrained loss is the unigram entropy."""
    model = transformer()
    initialise(model, Constraint(), seed=0)
    counts = np.array([5, 0, 1, 2, 0, 0, 13])
    initialise_biases(model, InitConfig(), counts)
    expected = np.log((counts + 1) / (counts.sum() + 7))
    np.testing.assert_allclose(model.head.bias.detach().numpy(), expected, rtol=1e-6)
    logits = model(torch.tensor([[0, 3, 6]])).detach()
    torch.testing.assert_close(logits.softmax(-1).sum(-1), torch.ones(1, 3))
    assert logits[0, 0, 6].exp().item() == pytest.approx(14 / 28)


def test_positional_heads_start_at_their_offsets():
    """Oracle: closed form; content heads favour recent tokens, further layers use the last list."""
    model = transformer(layers=3)
    initialise(model, Constraint(), seed=0)
    settings = InitConfig(offsets=((1, 2), (3,)), slope=2.0, content_slope=0.5)
    initialise_biases(model, settings, np.ones(7))
    for layer, offsets in enumerate([(1, 2, 1), (3, 3, 3), (3, 3, 3)]):
        table = model.layers[layer].attention.position_bias.detach()
        assert table[0].tolist() == [-0.5 * t for t in range(12)]
        for head, offset in enumerate(offsets, start=1):
            expected = [max(-2.0 * abs(t - offset), InitConfig().floor) for t in range(12)]
            assert table[head].tolist() == expected


def test_biases_that_the_model_lacks_are_skipped():
    """The paper's model has none of them."""
    model = transformer(position_bias=False, head_bias=False, content_heads=4)
    initialise(model, Constraint(), seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    initialise_biases(model, InitConfig(), np.ones(7))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_bad_offsets_are_config_errors():
    """Errors name the value."""
    with pytest.raises(ConfigError, match="offsets"):
        InitConfig(offsets=((1, -2),))
    with pytest.raises(ConfigError, match="slope"):
        InitConfig(slope=math.inf)


def test_blocks_without_a_skip_path_start_orthogonal():
    """Oracle: singular values by SVD; a zero output would cut the network in two."""
    config = ModelConfig(
        vocab_size=11,
        width=8,
        layers=2,
        heads=2,
        context=6,
        mlp_ratio=1,
        attn_residual=(1.0, 0.5),
        mlp_residual=1.0,
    )
    model = LipschitzTransformer(config)
    gains = {"layers.0.attention.value": (0.8, 0.6)}
    constraint = Constraint(kind="soft_cap", per_head=True, head_gains=gains)
    initialise(model, constraint, seed=0)
    first, second = model.layers
    for matrix in (first.attention.output, first.mlp.down, second.mlp.down):
        sigma = torch.linalg.svdvals(matrix.weight.double())
        assert torch.allclose(sigma, torch.ones_like(sigma), atol=1e-6)
    assert second.attention.output.weight.abs().max() == 0
    for gain, part_OI in zip((0.8, 0.6), first.attention.value.weight.chunk(2), strict=True):
        sigma = torch.linalg.svdvals(part_OI.double()) * 2**0.5
        assert torch.allclose(sigma, torch.full_like(sigma, gain), atol=1e-6)
