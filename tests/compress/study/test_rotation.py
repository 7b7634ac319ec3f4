"""Rotating the residual stream and cutting its weakest directions."""

import pytest
import torch

from common.errors import ConfigError
from common.models import LipschitzTransformer
from compress.study.rotation import directions, slice_width, width_for
from solvers.bounds import certify


@pytest.fixture
def tokens_BT():
    """Return random tokens of the tiny models' vocabulary."""
    return torch.randint(11, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_all_directions_give_the_same_logits(make_model, tokens_BT, activation):
    """Oracle: the dense forward pass; a change of basis is exact without normalisation."""
    model = make_model(activation, kv_heads=1, content_heads=2, vocab_multiple=4)
    q_CC = directions(model, tokens_BT)
    torch.testing.assert_close(q_CC.T @ q_CC, torch.eye(8).double(), rtol=0, atol=1e-12)
    turned = slice_width(model, q_CC, 8)
    assert not torch.equal(turned.embedding.weight, model.embedding.weight)
    torch.testing.assert_close(turned(tokens_BT), model(tokens_BT), rtol=0, atol=1e-10)


def test_a_stream_of_low_rank_loses_nothing(make_model, tokens_BT):
    """Oracle: weights that write into three directions only; three directions then suffice."""
    model = make_model("gelu")
    generator = torch.Generator().manual_seed(1)
    basis_CK = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))[0]
    project_CC = basis_CK @ basis_CK.T
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight @ project_CC)
        for layer in model.layers:
            for module in (layer.attention.output, layer.mlp.down):
                module.weight.copy_(project_CC @ module.weight)
            layer.mlp.down.bias.copy_(project_CC @ layer.mlp.down.bias)
    small = slice_width(model, directions(model, tokens_BT), 3)
    assert small.config.width == 3
    torch.testing.assert_close(small(tokens_BT), model(tokens_BT), rtol=0, atol=1e-10)


@pytest.mark.parametrize("width", [8, 6, 3, 1])
def test_naive_constants_do_not_grow(make_model, tokens_BT, width):
    """Oracle: certificates of both; every block's constant, the domain and the whole."""
    model = make_model("gelu")
    dense = certify(model, tighten=False)
    small = certify(slice_width(model, directions(model, tokens_BT), width), tighten=False)
    slack = 1 + 1e-9
    assert small.radius <= dense.radius * slack
    assert small.naive <= dense.naive * slack
    for new, old in zip(small.blocks, dense.blocks, strict=True):
        assert new.naive <= old.naive * slack


@pytest.mark.parametrize("width", [1, 5, 8])
def test_width_for_meets_the_parameters_of_that_width(make_model, width):
    """Oracle: a model built at that width."""
    model = make_model("maxmin")
    params = LipschitzTransformer(model.config.replace(width=width)).num_parameters
    assert width_for(model, params) == width
    assert width_for(model, 0) == 1


def test_impossible_width_is_one_line(make_model, tokens_BT):
    """Oracle: the range of the setting."""
    model = make_model()
    with pytest.raises(ConfigError, match="width=9: expected 1 to 8"):
        slice_width(model, directions(model, tokens_BT), 9)
