"""Slope and sector intervals against dense grids and the model's own activation."""

import math

import pytest
import torch

from common.errors import ConfigError
from common.models import LayerConfig, ModelConfig
from common.models.config import ACTIVATIONS
from common.models.layers import activate
from solvers.bounds import slopes

GRID = torch.linspace(-12, 12, 480001, dtype=torch.float64)
DIVISOR = 1.1289


def _layer(activation: str) -> LayerConfig:
    config = ModelConfig(vocab_size=4, width=8, layers=1, heads=1, context=4, activation=activation)
    return config.layer(0)


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        ("gelu", -0.1289041451851548 / DIVISOR, 1.128904145185155 / DIVISOR),
        ("gelu_tanh", -0.128993069 / DIVISOR, 1.128993069 / DIVISOR),
        ("relu", 0.0, 1.0),
        ("abs", -1.0, 1.0),
        ("maxmin", -1.0, 1.0),
    ],
)
def test_slope_interval_matches_the_table(activation: str, low: float, high: float) -> None:
    """Oracle: the specification's table, to its printed digits; widened outward."""
    found = slopes.slope_interval(activation, DIVISOR)
    assert found == pytest.approx((low, high), abs=1e-9)
    if activation != "gelu_tanh":
        assert found[0] < low < high < found[1]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "abs"])
def test_intervals_hold_and_are_attained_on_a_dense_grid(activation: str) -> None:
    """Oracle: autograd slopes and chords of the model's activation on 480001 points."""
    layer = _layer(activation)
    z = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activate(z, layer).sum(), z)
    slope = slope[GRID != 0]
    low, high = slopes.slope_interval(activation, DIVISOR)
    assert low <= float(slope.min())
    assert float(slope.max()) <= high
    assert float(slope.min()) - low < 1e-8
    assert high - float(slope.max()) < 1e-8
    chord = (activate(GRID, layer) / GRID)[GRID != 0]
    low, high = slopes.sector_interval(activation, DIVISOR)
    assert low <= float(chord.min())
    assert float(chord.max()) <= high


def test_gelu_slopes_have_no_second_maximum() -> None:
    """Oracle: phi'(z) tends to 1 and 0; far outside the grid the slope stays inside."""
    far = torch.tensor([-40.0, -20.0, 20.0, 40.0], dtype=torch.float64, requires_grad=True)
    for activation in ("gelu", "gelu_tanh"):
        (slope,) = torch.autograd.grad(activate(far, _layer(activation)).sum(), far)
        assert slope.tolist() == pytest.approx([0, 0, 1 / DIVISOR, 1 / DIVISOR], abs=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_apply_agrees_with_the_model(activation: str) -> None:
    """Oracle: the model's layer, to the stated rounding error."""
    layer = _layer(activation)
    z = 6 * torch.randn(50, layer.mlp_width, dtype=torch.float64)
    difference = (slopes.apply(z, layer) - activate(z, layer)).abs()
    scale = z.abs().amax(-1, keepdim=True)
    assert bool((difference <= slopes.PHI_ERROR * scale).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lipschitz_constant_bounds_random_pairs(activation: str) -> None:
    """Oracle: difference quotients of whole vectors, MaxMin included."""
    layer = _layer(activation)
    first, second = torch.randn(2, 400, layer.mlp_width, dtype=torch.float64)
    second = first + 0.1 * second
    ratio = (activate(first, layer) - activate(second, layer)).norm(dim=1)
    ratio /= (first - second).norm(dim=1)
    assert float(ratio.max()) <= slopes.lipschitz_constant(layer)


def test_the_extrema_are_where_the_source_says() -> None:
    """Oracle: closed form at sqrt 2; 1.4185 for the tanh variant."""
    phi = 0.5 * (1 + math.erf(1.0)) + math.sqrt(2) * math.exp(-1) / math.sqrt(2 * math.pi)
    assert pytest.approx(phi, abs=1e-15) == slopes.GELU_TOP
    assert pytest.approx(1.128993069, abs=1e-9) == slopes.GELU_TANH_TOP


def test_unknown_activation_is_refused() -> None:
    """Oracle: the contract."""
    with pytest.raises(ConfigError, match="swish"):
        slopes.slope_interval("swish")
