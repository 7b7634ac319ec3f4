"""Exact slope and sector intervals of the activations, widened outward.

A slope interval holds every difference quotient ``(phi(u) - phi(v)) / (u - v)``; a sector
interval holds ``phi(z) / z`` (all activations vanish at 0). MaxMin is not elementwise: with
``max = (s + |t|) / 2`` and ``min = (s - |t|) / 2`` of the sum s and difference t of a pair, its
nonlinear part is an absolute value, whose interval is the one given here for it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import one_of
from common.models import LayerConfig
from common.models.config import ACTIVATIONS

WIDEN = 1e-12
"""Outward widening of every interval end, absolute (slopes are of order one)."""

PHI_ERROR = 1e-13
"""Rounding error of ``apply`` in float64, relative to the magnitude of its argument."""


def slope_interval(activation: str, divisor: float = 1.0) -> tuple[float, float]:
    """Return an interval that holds all slopes of the activation.

    Args:
        activation: One of ``ACTIVATIONS``; for ``maxmin`` the interval of ``|t|``.
        divisor: Both GELU variants are divided by it; ignored by the others.

    Returns:
        ``(low, high)``, each end moved outward by 1e-12.

    Source:
        GELU' = Phi + z pdf has its extrema at +-sqrt 2; those of the tanh variant are found by
        bisection on the second derivative. Both satisfy phi'(-z) = 1 - phi'(z).
    """
    one_of("activation", activation, ACTIVATIONS)
    if activation == "relu":
        low, high = 0.0, 1.0
    elif activation in ("abs", "maxmin"):
        low, high = -1.0, 1.0
    else:
        top = GELU_TOP if activation == "gelu" else GELU_TANH_TOP
        low, high = (1.0 - top) / divisor, top / divisor
    return low - WIDEN, high + WIDEN


def sector_interval(activation: str, divisor: float = 1.0) -> tuple[float, float]:
    """Return an interval that holds ``phi(z) / z`` for all ``z``; arguments as in slopes."""
    if activation in ("gelu", "gelu_tanh"):
        return -WIDEN, 1.0 / divisor + WIDEN
    return slope_interval(activation, divisor)


def lipschitz_constant(layer: LayerConfig) -> float:
    """Return an upper bound on the l2 Lipschitz constant of the whole activation map."""
    low, high = slope_interval(layer.activation, layer.gelu_divisor)
    return max(abs(low), abs(high))


def apply(z: Tensor, layer: LayerConfig) -> Tensor:
    """Evaluate the layer's activation in the type of ``z`` (..., F), independently of the model."""
    if layer.activation == "maxmin":
        sums, differences = z[..., ::2] + z[..., 1::2], (z[..., ::2] - z[..., 1::2]).abs()
        return torch.stack(((sums + differences) / 2, (sums - differences) / 2), -1).flatten(-2)
    if layer.activation == "relu":
        return z.clamp(min=0)
    if layer.activation == "abs":
        return z.abs()
    if layer.activation == "gelu":
        return 0.5 * z * torch.special.erfc(-z / math.sqrt(2)) / layer.gelu_divisor
    return F.gelu(z, approximate="tanh") / layer.gelu_divisor


def _gelu_tanh_slope(z: float) -> float:
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    t = math.tanh(inner)
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner_slope


def _gelu_tanh_curvature(z: float) -> float:
    scale = math.sqrt(2 / math.pi)
    inner, slope = scale * (z + 0.044715 * z**3), scale * (1 + 3 * 0.044715 * z**2)
    t = math.tanh(inner)
    return (1 - t * t) * (slope + 3 * scale * 0.044715 * z * z - z * t * slope * slope)


def _gelu_tanh_top() -> float:
    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _gelu_tanh_curvature(middle) > 0 else (low, middle)
    return _gelu_tanh_slope((low + high) / 2)


GELU_TOP = 0.5 * math.erfc(-1.0) + math.exp(-1.0) / math.sqrt(math.pi)
"""Largest slope of the erf GELU, at sqrt 2: Phi(sqrt 2) + sqrt 2 pdf(sqrt 2)."""

GELU_TANH_TOP = _gelu_tanh_top()
"""Largest slope of the tanh GELU, near 1.4185."""
