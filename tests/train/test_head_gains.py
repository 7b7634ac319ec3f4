"""Unequal heads and mixed constraints: singular values by SVD are the oracle."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.models import LipschitzTransformer, ModelConfig
from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups
from train.init import initialise
from train.optim import Muon

GAINS = (0.8, 0.6)
# float32 rounding of a cap, and of three Newton-Schulz steps from a tenth away.
CAP_SLACK, RETRACTION_SLACK = 1e-5, 1e-4


def model():
    """One mixing layer with two heads and no skip path."""
    config = ModelConfig(
        vocab_size=11,
        width=16,
        layers=1,
        heads=2,
        context=6,
        mlp_ratio=1,
        attn_residual=1.0,
        mlp_residual=1.0,
    )
    return LipschitzTransformer(config)


def constraint(**changes):
    """Stiefel matrices with unequal value heads, a capped head matrix."""
    settings = {"kind": "stiefel", "kinds": {"head": "soft_cap"}, "per_head": True}
    settings |= {"head_gains": {"attention.value": GAINS}}
    return Constraint(**(settings | changes))


def relative_sigma(w_OI):
    """Singular values in RMS->RMS units, float64."""
    return (w_OI.shape[1] / w_OI.shape[0]) ** 0.5 * torch.linalg.svdvals(w_OI.detach().double())


def trained(rules, steps=30, lr=0.1):
    """Return a model after random Muon steps under the rules."""
    network, optim = model(), OptimConfig(lr=lr)
    initialise(network, rules, seed=0)
    groups = parameter_groups(network, optim, rules)
    optimizer = Muon(groups, **optimizer_defaults(optim, rules))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return network


def test_every_head_stays_at_its_own_norm():
    """Each value head's singular values equal its gain; the other matrices' equal 1."""
    attention = trained(constraint()).layers[0].attention
    for gain, part_OI in zip(GAINS, attention.value.weight.chunk(2), strict=True):
        sigma = relative_sigma(part_OI)
        assert sigma.max() <= gain * (1 + CAP_SLACK)
        assert sigma.min() >= gain * (1 - RETRACTION_SLACK)
    sigma = relative_sigma(attention.output.weight)
    assert sigma.min() >= 1 - RETRACTION_SLACK
    assert sigma.max() <= 1 + CAP_SLACK


def test_the_head_follows_its_own_constraint():
    """A soft cap leaves singular values below it, which Stiefel would not."""
    sigma = relative_sigma(trained(constraint()).head.weight)
    assert sigma.max() <= 1 + CAP_SLACK
    assert sigma.min() < 0.9


def test_updates_shrink_with_the_gain_of_their_head():
    """Oracle: the update of equal heads, scaled by hand."""
    rows, gains = torch.randn(8, 6), (1.0, 0.25)
    even, uneven = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8, 6))
    for parameter, factors in ((even, None), (uneven, gains)):
        parameter.grad = rows.clone()
        Muon([parameter], lr=0.1, slices=2, gains=factors).step()
    expected = torch.cat((even[:4], 0.25 * even[4:]))
    assert torch.allclose(uneven, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"per_head": False},
        {"head_gains": {"attention.value": (0.8, 0.0)}},
        {"head_gains": {"attention.value": 0.5}},
        {"kinds": {"head": "softcap"}},
    ],
)
def test_impossible_settings_are_refused(changes):
    """One line that names the field."""
    with pytest.raises(ConfigError, match=r"constraint\."):
        constraint(**changes)


def test_gains_must_match_the_heads_and_patterns_a_matrix():
    """Three gains for two heads, and a pattern that nothing matches."""
    three = constraint(head_gains={"attention.value": (0.8, 0.5, 0.2)})
    with pytest.raises(ConfigError, match="2 heads"):
        parameter_groups(model(), OptimConfig(), three)
    unknown = constraint(head_gains={"layers.7": GAINS})
    with pytest.raises(ConfigError, match=r"layers\.7"):
        parameter_groups(model(), OptimConfig(), unknown)


def test_a_block_of_weight_zero_is_the_identity():
    """Oracle: the general formula with a hook, which is never short-cut."""
    config = model().config.replace(attn_residual=(0.0,), mlp_residual=(0.0,))
    network = LipschitzTransformer(config)
    x_BTC = torch.randn(2, 6, 16)
    layer = network.layers[0]
    assert torch.equal(layer(x_BTC), x_BTC)
    hooked = layer.attend_block(x_BTC, attend=lambda index, q, k, v: torch.ones_like(q))
    assert torch.allclose(hooked, x_BTC)
