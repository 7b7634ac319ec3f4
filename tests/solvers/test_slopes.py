"""Slope and sector intervals against dense grids and the model's own activation."""

import dataclasses
import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from common.models import LayerConfig, ModelConfig
from common.models.config import ACTIVATIONS, DIVIDED
from common.models.layers import activate
from solvers.bounds import slopes

GRID = torch.linspace(-12, 12, 480001, dtype=torch.float64)
DIVISOR = 1.1289
QUOTIENT_ROUNDING = 1e-10  # of quotients over moves of at least 1e-4


def _layer(activation: str) -> LayerConfig:
    config = ModelConfig(vocab_size=4, width=8, layers=1, heads=1, context=4, activation=activation)
    return config.layer(0)


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [
        ("gelu", -0.1289041451851548 / DIVISOR, 1.128904145185155 / DIVISOR),
        ("gelu_tanh", -0.128993069 / DIVISOR, 1.128993069 / DIVISOR),
        ("silu", -0.0998393194 / DIVISOR, 1.0998393194 / DIVISOR),
        ("tanh", 0.0, 1.0),
        ("relu", 0.0, 1.0),
        ("abs", -1.0, 1.0),
        ("maxmin", -1.0, 1.0),
    ],
)
def test_slope_interval_matches_the_table(activation: str, low: float, high: float) -> None:
    """Oracle: the specification's table, to its printed digits; widened outward."""
    found = slopes.slope_interval(activation, DIVISOR)
    assert found == pytest.approx((low, high), abs=1e-9)
    if activation not in ("gelu_tanh", "silu"):
        assert found[0] < low < high < found[1]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh", "relu", "abs"])
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
    with pytest.raises(ConfigError, match="swish"):
        slopes.local_slopes("swish", GRID[:2], GRID[1:3])
    with pytest.raises(ShapeError, match="float64"):
        slopes.local_slopes("relu", GRID[:2], GRID[:3])


def _intervals() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ends around every kink and turning point, of all widths, and random ones."""
    centre = torch.tensor([-9.0, -2.3994, -1.4185, -0.6, 0.0, 1e-7, 0.8, 1.4142, 2.41, 7.0])
    width = torch.tensor([0.0, 1e-9, 1e-3, 0.4, 2.0, 30.0])
    centre, width = (part.flatten() for part in torch.meshgrid(centre, width, indexing="ij"))
    centre = torch.cat((centre, 3 * torch.randn(200))).double()
    width = torch.cat((width, torch.rand(200))).double()
    return centre - width, centre + width


def _elementwise(activation: str, z: torch.Tensor, divisor: float) -> torch.Tensor:
    if activation == "maxmin":
        return z.abs()
    return activate(z, dataclasses.replace(_layer(activation), gelu_divisor=divisor))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("divisor", [DIVISOR, 0.01, 50.0])
def test_local_slopes_hold_and_are_attained(activation: str, divisor: float) -> None:
    """Oracle: autograd slopes on 4001 points of every interval, its ends included."""
    low, high = _intervals()
    least, most = slopes.local_slopes(activation, low, high, divisor)
    step = torch.linspace(0, 1, 4001, dtype=torch.float64)
    z = (low[:, None] + (high - low)[:, None] * step).requires_grad_()
    (slope,) = torch.autograd.grad(_elementwise(activation, z, divisor).sum(), z)
    kinked = activation in ("relu", "abs", "maxmin")
    usable = (z != 0) | (not kinked)
    scale = max(1.0, 1 / divisor)
    assert bool((slope >= least[:, None])[usable].all())
    assert bool((slope <= most[:, None])[usable].all())
    if not kinked:
        # A grid misses a turning point by at most half a step.
        missed = scale * ((high - low) / 4000 + 1e-9)
        assert bool((slope.amin(1) - least <= missed).all())
        assert bool((most - slope.amax(1) <= missed).all())
    floor, ceiling = slopes.slope_interval(activation, divisor)
    assert bool((least >= floor).all() and (most <= ceiling).all() and (least <= most).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_slopes_are_the_limits(activation: str) -> None:
    """Oracle: the limits of the slope; an infinite interval gives the global one."""
    inf = torch.tensor([math.inf, -200.0, 200.0, 1e9], dtype=torch.float64)
    low, high = slopes.local_slopes(activation, -inf.abs(), inf.abs(), DIVISOR)
    assert bool((high - low > 0.9).all())
    near, far = slopes.local_slopes(activation, inf[2:] - 1, inf[2:], DIVISOR)
    limit = {"tanh": 0.0}.get(activation, 1 / DIVISOR if activation in DIVIDED else 1.0)
    assert near.tolist() == pytest.approx([limit] * 2, abs=1e-11)
    assert far.tolist() == pytest.approx([limit] * 2, abs=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chord_slopes_hold_every_quotient(activation: str) -> None:
    """Oracle: quotients between random points within reach and points within doubt."""
    rest = 2 * torch.randn(300, dtype=torch.float64)
    reach, doubt = torch.rand(2, 300, dtype=torch.float64)
    reach, doubt = 3 * reach**3, 0.3 * doubt**4
    low, high = slopes.chord_slopes(activation, rest, doubt, reach, DIVISOR)
    far = reach + doubt
    wide = slopes.local_slopes(activation, rest - far, rest + far, DIVISOR)
    assert bool((low >= wide[0]).all() and (high <= wide[1]).all())
    start = rest + doubt * (2 * torch.rand(2000, 1, dtype=torch.float64) - 1)
    move = 2 * torch.rand(2000, 300, dtype=torch.float64) - 1
    move[:2] = torch.tensor([[-1.0], [1.0]])
    move = move * reach
    rise = _elementwise(activation, start + move, DIVISOR)
    rise = rise - _elementwise(activation, start, DIVISOR)
    usable = move.abs() > 1e-4
    quotient = torch.where(usable, rise / move, torch.nan)
    assert not bool((quotient < low - QUOTIENT_ROUNDING).any())
    assert not bool((quotient > high + QUOTIENT_ROUNDING).any())


def test_chords_of_a_kink_are_halved_on_average() -> None:
    """Oracle: |z| from 1 within reach 2 has quotients from 0 to 1; its slopes span -1 to 1."""
    rest, doubt, reach = torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.float64)
    low, high = slopes.chord_slopes("abs", rest, doubt, reach)
    assert (float(low), float(high)) == pytest.approx((0.0, 1.0), abs=1e-11)
    low, high = slopes.local_slopes("abs", rest - reach, rest + reach)
    assert (float(low), float(high)) == (-1.0, 1.0)


@pytest.mark.parametrize("activation", slopes.CURVATURE)
def test_curvature_bounds_the_second_derivative(activation: str) -> None:
    """Oracle: automatic differentiation on a fine grid."""
    z = torch.linspace(-8, 8, 100001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_elementwise(activation, z, 1.0).sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    assert 0.99 * slopes.CURVATURE[activation] < float(bend.abs().max())
    assert float(bend.abs().max()) < slopes.CURVATURE[activation]
