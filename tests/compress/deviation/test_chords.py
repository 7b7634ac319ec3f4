"""Intervals of difference quotients."""

import pytest
import torch

from common.models import LayerConfig
from common.models.config import ACTIVATIONS, DIVIDED
from compress.deviation.chords import CURVATURE, chord_interval
from solvers.bounds.slopes import apply, slope_interval

ROUNDING = 1e-9


def layer(activation: str) -> LayerConfig:
    """Return a layer that only names its activation."""
    return LayerConfig(
        heads=1,
        kv_heads=1,
        content_heads=1,
        head_dim=2,
        mlp_width=2,
        activation=activation,
        gelu_divisor=1.1289,
        mlp_bias=True,
        position_bias=False,
        attn_residual=0.5,
        mlp_residual=0.5,
        attn_factor=1.0,
        softmax_scale=1.0,
    )


def nonlinearity(name: str, z: torch.Tensor) -> torch.Tensor:
    """Return the elementwise part: ``|t|`` for MaxMin."""
    return z.abs() if name == "maxmin" else apply(z, layer(name))


RESTS = torch.tensor([-3.0, -1.3, -0.4, -1e-3, 0.0, 0.2, 0.9, 1.7, 6.0], dtype=torch.float64)
REACHES = torch.tensor([0.0, 1e-9, 1e-3, 0.3, 1.0, 2.5, 8.0, 200.0], dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_interval_holds_every_quotient_and_is_not_wider_than_the_slopes(activation):
    """Oracle: quotients at random points of the reach, also very close to the ends."""
    rest, reach = (grid.flatten() for grid in torch.meshgrid(RESTS, REACHES, indexing="ij"))
    low, high = chord_interval(layer(activation), rest, reach)
    generator = torch.Generator().manual_seed(0)
    move = 2 * torch.rand(len(rest), 4000, generator=generator, dtype=torch.float64) - 1
    move[:, :2] = torch.tensor([-1.0, 1.0])
    move = move * reach[:, None]
    rise = nonlinearity(activation, rest[:, None] + move) - nonlinearity(activation, rest)[:, None]
    usable = move.abs() > 1e-6
    quotient = torch.where(usable, rise / move, torch.nan)
    assert not bool((quotient < low[:, None] - ROUNDING).any())
    assert not bool((quotient > high[:, None] + ROUNDING).any())
    floor, ceiling = slope_interval(activation, 1.1289)
    assert bool((low >= floor).all())
    assert bool((high <= ceiling).all())
    assert bool((low <= high).all())


def test_linear_reach_gives_a_point():
    """A ReLU or absolute value that cannot reach its kink is linear."""
    rest = torch.tensor([2.0, -2.0], dtype=torch.float64)
    reach = torch.full((2,), 1.5, dtype=torch.float64)
    for activation, values in (("relu", (1.0, 0.0)), ("abs", (1.0, -1.0))):
        low, high = chord_interval(layer(activation), rest, reach)
        expected = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(low, expected, rtol=0, atol=1e-7)
        torch.testing.assert_close(high, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh"])
def test_neurons_far_out_are_linear(activation):
    """Oracle: the limits of the slopes, where exponentials of the resting point overflow."""
    rest = torch.tensor([-800.0, -1e5, 800.0, 1e5], dtype=torch.float64)
    ends = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    share = 1.1289 if activation in DIVIDED else torch.inf
    for reach in (1e-3, 5.0):
        for bound in chord_interval(layer(activation), rest, torch.full((4,), reach).double()):
            torch.testing.assert_close(bound, ends / share, rtol=0, atol=5e-3)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh"])
def test_curvature_constant_bounds_the_second_derivative(activation):
    """Oracle: automatic differentiation on a fine grid."""
    z = torch.linspace(-8, 8, 100001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(apply(z, layer(activation)).sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    share = 1.1289 if activation in DIVIDED else 1.0
    assert float(bend.abs().max()) * share < CURVATURE
