"""Exact slope and sector intervals of the activations, widened outward.

A slope interval holds every difference quotient ``(phi(u) - phi(v)) / (u - v)``; a sector
interval holds ``phi(z) / z`` (all activations vanish at 0). MaxMin is not elementwise: with
``max = (s + |t|) / 2`` and ``min = (s - |t|) / 2`` of the sum s and difference t of a pair, its
nonlinear part is an absolute value, whose interval is the one given here for it.
"""

# Shape letters: N neurons, F pre-activations.

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import one_of
from common.errors import ShapeError
from common.models import LayerConfig
from common.models.config import ACTIVATIONS, DIVIDED

WIDEN = 1e-12
"""Outward widening of every interval end, absolute (slopes are of order one)."""

PHI_ERROR = 1e-13
"""Rounding error of ``apply`` in float64, relative to the magnitude of its argument."""

CURVATURE = {"gelu": 0.798, "gelu_tanh": 0.798, "silu": 0.501, "tanh": 0.77}
"""Bounds on ``|phi''|`` before division: at 0 for the first three, 4 / 3^1.5 for tanh."""

_KINKED = ("relu", "abs", "maxmin")
# Beyond this all slopes are within 1e-20 of their limits, and nothing overflows.
_FAR = 64.0
_NEAR_TURN = 1e-9


def slope_interval(activation: str, divisor: float = 1.0) -> tuple[float, float]:
    """Return an interval that holds all slopes of the activation.

    Args:
        activation: One of ``ACTIVATIONS``; for ``maxmin`` the interval of ``|t|``.
        divisor: Those in ``DIVIDED`` are divided by it; ignored by the others.

    Returns:
        ``(low, high)``, each end moved outward by 1e-12.

    Source:
        GELU' = Phi + z pdf has its extrema at +-sqrt 2; those of its tanh variant and of SiLU are
        found by bisection on the second derivative. All three satisfy phi'(-z) = 1 - phi'(z).
    """
    one_of("activation", activation, ACTIVATIONS)
    if activation in ("abs", "maxmin"):
        low, high = -1.0, 1.0
    elif activation in DIVIDED:
        low, high = (1.0 - _TOPS[activation]) / divisor, _TOPS[activation] / divisor
    else:
        low, high = 0.0, 1.0
    margin = _margin(activation, divisor)
    return low - margin, high + margin


def sector_interval(activation: str, divisor: float = 1.0) -> tuple[float, float]:
    """Return an interval that holds ``phi(z) / z`` for all ``z``; arguments as in slopes."""
    if activation in DIVIDED:
        margin = _margin(activation, divisor)
        return -margin, 1.0 / divisor + margin
    return slope_interval(activation, divisor)


def local_slopes(
    activation: str, low_N: Tensor, high_N: Tensor, divisor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return per neuron an interval of all slopes between two pre-activations.

    Args:
        activation: One of ``ACTIVATIONS``; for ``maxmin`` the slopes of ``|t|``.
        low_N: Smallest pre-activations (any shape), float64, infinite ones allowed.
        high_N: Largest pre-activations (same shape), at least ``low_N``.
        divisor: As in ``slope_interval``.

    Returns:
        Two float64 tensors of the same shape. They hold every difference quotient inside; kinked
        activations have exact ends, those of smooth ones are moved outward by 1e-12.

    Raises:
        ShapeError: for tensors of different shapes or not float64.
        ConfigError: for an unknown activation.
    """
    one_of("activation", activation, ACTIVATIONS)
    if low_N.shape != high_N.shape or {low_N.dtype, high_N.dtype} != {torch.float64}:
        raise ShapeError(
            f"ends of {low_N.dtype} {tuple(low_N.shape)} and {high_N.dtype} "
            f"{tuple(high_N.shape)}: expected float64 of one shape"
        )
    if activation in _KINKED:
        return _kinked(activation, (low_N > 0).double(), (high_N >= 0).double())
    ends_2N = _slope(activation, torch.stack((low_N, high_N)).clamp(-_FAR, _FAR))
    least_N, most_N = ends_2N.amin(0), ends_2N.amax(0)
    for turn in _TURNS[activation]:
        value = _slope(activation, torch.tensor(turn, dtype=torch.float64))
        inside_N = (low_N <= turn + _NEAR_TURN) & (high_N >= turn - _NEAR_TURN)
        least_N = torch.where(inside_N, least_N.minimum(value), least_N)
        most_N = torch.where(inside_N, most_N.maximum(value), most_N)
    share, margin = _share(activation, divisor), _margin(activation, divisor)
    floor, ceiling = slope_interval(activation, divisor)
    return (least_N / share - margin).clamp(min=floor), (most_N / share + margin).clamp(max=ceiling)


def chord_slopes(
    activation: str, rest_N: Tensor, doubt_N: Tensor, reach_N: Tensor, divisor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return per neuron an interval of the difference quotients from one resting point.

    Args:
        activation: One of ``ACTIVATIONS``; for ``maxmin`` the quotients of ``|t|``.
        rest_N: Resting pre-activations (any shape), float64.
        doubt_N: How far the true resting point may lie from ``rest_N``, not negative.
        reach_N: How far a pre-activation may move from the resting point, not negative.
        divisor: As in ``slope_interval``.

    Returns:
        Two float64 tensors: they hold ``(phi(z) - phi(z0)) / (z - z0)`` for all ``z`` within reach
        of any ``z0`` within doubt, and are never wider than ``local_slopes``.

    Source:
        Quotients of a convex function grow with both of its points; those of a smooth one lie
        within half the curvature times the reach of its slope at ``z0``.
    """
    far_N = reach_N + doubt_N
    low_N, high_N = local_slopes(activation, rest_N - far_N, rest_N + far_N, divisor)
    if activation not in _KINKED:
        share, bend = _share(activation, divisor), CURVATURE[activation]
        slope_N = _slope(activation, rest_N.clamp(-_FAR, _FAR)) / share
        spread_N = bend / share * (reach_N / 2 + doubt_N) * (1 + WIDEN)
        spread_N = spread_N + _margin(activation, divisor)
        return low_N.maximum(slope_N - spread_N), high_N.minimum(slope_N + spread_N)
    safe_N = reach_N.clamp(min=torch.finfo(torch.float64).tiny)
    least_N, most_N = rest_N - doubt_N, rest_N + doubt_N
    down_N = (least_N / safe_N - WIDEN).clamp(min=0.0)
    up_N = (1 + most_N / safe_N + WIDEN).clamp(min=0.0)
    relu_low_N = torch.where(least_N > reach_N, 1.0, down_N.clamp(max=1.0))
    relu_high_N = torch.where(most_N < -reach_N, 0.0, up_N.clamp(max=1.0))
    return _kinked(activation, relu_low_N, relu_high_N)


def lipschitz_constant(layer: LayerConfig) -> float:
    """Return an upper bound on the l2 Lipschitz constant of the whole activation map."""
    low, high = slope_interval(layer.activation, layer.gelu_divisor)
    return max(abs(low), abs(high))


def apply(z: Tensor, layer: LayerConfig) -> Tensor:
    """Evaluate the layer's activation in the type of ``z`` (..., F), independently of the model."""
    match layer.activation:
        case "maxmin":
            # Exact: a sum and a difference would round relative to the larger of a pair.
            first, second = z[..., ::2], z[..., 1::2]
            return torch.stack((first.maximum(second), first.minimum(second)), -1).flatten(-2)
        case "relu":
            return z.clamp(min=0)
        case "abs":
            return z.abs()
        case "tanh":
            return z.tanh()
        case "silu":
            return z / (1 + (-z).exp()) / layer.gelu_divisor
        case "gelu":
            return 0.5 * z * torch.special.erfc(-z / math.sqrt(2)) / layer.gelu_divisor
    return F.gelu(z, approximate="tanh") / layer.gelu_divisor


def _share(activation: str, divisor: float) -> float:
    return divisor if activation in DIVIDED else 1.0


def _margin(activation: str, divisor: float) -> float:
    # A small divisor enlarges slopes and their rounding alike.
    return WIDEN * max(1.0, 1.0 / _share(activation, divisor))


def _kinked(activation: str, low_N: Tensor, high_N: Tensor) -> tuple[Tensor, Tensor]:
    """Turn quotients of relu into those of the activation: ``|z| = 2 relu(z) - z``."""
    return (low_N, high_N) if activation == "relu" else (2 * low_N - 1, 2 * high_N - 1)


def _slope(activation: str, z: Tensor) -> Tensor:
    """Return ``phi'`` before division, to an absolute error far below ``WIDEN``."""
    if activation == "gelu":
        pdf = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * torch.special.erfc(-z / math.sqrt(2)) + z * pdf
    if activation == "silu":
        return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    if activation == "tanh":
        return 1 - z.tanh().square()
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * 0.044715 * z**2)


def _gelu_tanh_curvature(z: float) -> float:
    scale = math.sqrt(2 / math.pi)
    inner, slope = scale * (z + 0.044715 * z**3), scale * (1 + 3 * 0.044715 * z**2)
    t = math.tanh(inner)
    return (1 - t * t) * (slope + 3 * scale * 0.044715 * z * z - z * t * slope * slope)


def _silu_curvature(z: float) -> float:
    return 2 - z * math.tanh(z / 2)


def _root(curvature: Callable[[float], float], low: float, high: float) -> float:
    """Return where a decreasing function is zero, to the last digit."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curvature(middle) > 0 else (low, middle)
    return (low + high) / 2


_TURN = {
    "gelu": math.sqrt(2),
    "gelu_tanh": _root(_gelu_tanh_curvature, 1.0, 2.0),
    "silu": _root(_silu_curvature, 2.0, 3.0),
}
_TURNS = {name: (-turn, turn) for name, turn in _TURN.items()} | {"tanh": (0.0,)}
_TOPS = {name: float(_slope(name, torch.tensor(turn).double())) for name, turn in _TURN.items()}

GELU_TOP = _TOPS["gelu"]
"""Largest slope of the erf GELU, at sqrt 2: Phi(sqrt 2) + sqrt 2 pdf(sqrt 2)."""

GELU_TANH_TOP = _TOPS["gelu_tanh"]
"""Largest slope of the tanh GELU, near 1.4185."""

SILU_TOP = _TOPS["silu"]
"""Largest slope of SiLU, near 2.3994."""
