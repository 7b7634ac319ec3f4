"""Intervals of difference quotients from a neuron's resting point, on a bounded input.

For inputs of norm at most R a pre-activation ``z = g x + b`` stays within ``reach = R |g|`` of
``b``; the interval holds ``(phi(z) - phi(b)) / (z - b)`` for all of them. It is never wider than
the slope interval, and at ``b = 0`` it is the sector. Everything is widened outward.
"""

# Legend: N neurons, P grid points.

import torch
from torch import Tensor

from common.models import LayerConfig
from common.models.config import DIVIDED
from solvers.bounds.slopes import apply, slope_interval

GRID = 513
"""Grid points per neuron, odd so that the resting point is one of them."""
CURVATURE = 0.81
"""Bound on |phi''| of all smooth activations before division (GELU: 0.7979 at 0; tanh: 0.7698)."""
NEAR = 1e-2
"""Reach below which a Taylor bound replaces the grid, whose quotients would lose digits."""
FAR = 64.0
"""Resting points beyond it have the slopes of those at it."""
WIDEN = 1e-8
"""Outward widening: above the rounding of quotients on a grid of at least NEAR / GRID."""


def chord_interval(layer: LayerConfig, rest_N: Tensor, reach_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(low, high)`` of the difference quotients of the elementwise nonlinearity.

    Args:
        layer: Names the activation; for MaxMin the nonlinearity is ``|t|``.
        rest_N: Pre-activation at input zero (the bias), float64.
        reach_N: How far the pre-activation can move from there, float64, not negative.

    Returns:
        Two tensors (N), float64.

    Source:
        Own derivation. A difference quotient moves by at most half the curvature bound per unit
        of z, which turns grid values into bounds.
    """
    floor, ceiling = slope_interval(layer.activation, layer.gelu_divisor)
    if layer.activation == "relu":
        low_N, high_N = _relu(rest_N, reach_N)
    elif layer.activation in ("abs", "maxmin"):
        # |z| = 2 relu(z) - z, also for difference quotients.
        low_N, high_N = (2 * part - 1 for part in _relu(rest_N, reach_N))
    else:
        low_N, high_N = _smooth(layer, rest_N, reach_N)
    return (low_N - WIDEN).clamp(min=floor), (high_N + WIDEN).clamp(max=ceiling)


def _relu(rest_N: Tensor, reach_N: Tensor) -> tuple[Tensor, Tensor]:
    """Quotients lie between those at the two ends of the reachable interval."""
    safe_N = reach_N.clamp(min=torch.finfo(torch.float64).tiny)
    low_N = torch.where(rest_N > 0, (rest_N / safe_N).clamp(max=1.0), 0.0)
    high_N = torch.where(rest_N > 0, 1.0, (1 + rest_N / safe_N).clamp(min=0.0))
    return low_N, high_N


def _smooth(layer: LayerConfig, rest_N: Tensor, reach_N: Tensor) -> tuple[Tensor, Tensor]:
    # Farther out slopes stand still to 1e-20, and exponentials overflow.
    rest = rest_N.clamp(-FAR, FAR).requires_grad_()
    with torch.enable_grad():
        (slope_N,) = torch.autograd.grad(apply(rest, layer).sum(), rest)
    share = layer.gelu_divisor if layer.activation in DIVIDED else 1.0
    bend_N = 0.5 * CURVATURE / share * reach_N
    steps_P = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    moves_NP = reach_N.clamp(min=NEAR)[:, None] * steps_P
    rise_NP = apply(rest_N[:, None] + moves_NP, layer) - apply(rest_N, layer)[:, None]
    centre = GRID // 2
    moves_NP[:, centre] = 1.0
    quotients_NP = rise_NP / moves_NP
    quotients_NP[:, centre] = slope_N
    margin_N = bend_N / (GRID - 1)
    is_near = reach_N < NEAR
    low_N = torch.where(is_near, slope_N - bend_N, quotients_NP.amin(1) - margin_N)
    high_N = torch.where(is_near, slope_N + bend_N, quotients_NP.amax(1) + margin_N)
    return low_N, high_N
