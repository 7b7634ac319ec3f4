"""The Lipschitz constant in use: where the first one comes from, and how evaluations correct it.

A constant that was not given is only a lower bound of the true one. It makes a method heuristic,
never a residual. Source: spec halpern_solvers 5.5.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.oracle import Oracle
from solvers.solution import Status
from solvers.structure import inner, norm

_PROBE_SIZE = 1e-3  # relative length of the probe that estimates a constant
_SEED = 0
_POWER_STEPS = 50
_POWER_TOL = 1e-3  # relative change that ends a power iteration
_POWER_MARGIN = 1.02  # a power iteration approaches the norm from below
_NOISE_UNITS = 16.0  # rounding allowance of the tests of slopes, in units of eps
_NEGATIVE = 1e-10  # relative size of an inner product that counts as negative
_SKEW = 1e4  # L over the observed slope beyond which F cannot be called cocoercive
_MAX_DOUBLINGS = 40
_MAX_NONFINITE = 12  # in a whole run

Judgement = tuple[bool, Status | None]


def first_lipschitz(oracle: Oracle, point: Tensor, value: Tensor) -> float:
    """Return the constant to begin with: given, of the run continued, powered or probed.

    Args:
        oracle: The problem; its ``lipschitz_floor`` is respected.
        point: Where F is probed.
        value: ``F(point)``.

    Returns:
        L > 0; 1 for an operator that is constant.
    """
    problem = oracle.problem
    lipschitz = problem.lipschitz_bound
    if lipschitz is None and oracle.warm is not None:
        lipschitz = oracle.warm.lipschitz
    if lipschitz is None:
        lipschitz = problem.lipschitz_est
    if lipschitz is None and getattr(problem, "linear", False):
        lipschitz = power_lipschitz(oracle, point)
        if lipschitz is not None:
            oracle.lipschitz_source = "power"
            oracle.lipschitz_floor = max(oracle.lipschitz_floor, lipschitz)
    if lipschitz is None:
        lipschitz = probed_lipschitz(oracle, point, value)
    return max(lipschitz, oracle.lipschitz_floor) or 1.0


def relaxed(oracle: Oracle, lipschitz: float, factor: float) -> float:
    """Return a smaller constant to try after progress, for operators that are flatter ahead.

    A given bound, the norm of a linear operator and what recovery has taught remain.

    Args:
        oracle: The problem.
        lipschitz: Constant in use.
        factor: In (0, 1].
    """
    known = max(oracle.problem.lipschitz_bound or 0.0, oracle.lipschitz_floor)
    return max(known, factor * lipschitz)


def probed_lipschitz(oracle: Oracle, point: Tensor, value: Tensor) -> float:
    """Return the slope of F along one random probe from ``point``; 1 where F is constant."""
    probe = _random_like(point)
    probe *= _PROBE_SIZE * max(1.0, norm(point)) / max(1e-30, norm(probe))
    slope = norm(oracle.full(point + probe) - value) / max(1e-30, norm(probe))
    return slope if 0 < slope < float("inf") else 1.0


def power_lipschitz(oracle: Oracle, point: Tensor) -> float | None:
    """Return the spectral norm of a linear operator by power iteration on its normal operator.

    The adjoint comes from reverse-mode differentiation; every product counts as an evaluation.

    Returns:
        The norm with a small margin, or None when F cannot be differentiated.
    """
    with torch.enable_grad():
        origin = torch.zeros_like(point, requires_grad=True)
        oracle.full_evals += 1
        value = oracle.attached(origin)
    if not value.requires_grad:
        return None
    direction, size = _random_like(point), 0.0
    for _ in range(_POWER_STEPS):
        direction /= max(1e-30, norm(direction))
        image = oracle.full(direction) - value.detach()
        previous, size = size, norm(image)
        if not 0 < size < float("inf"):
            return None
        if size <= previous * (1 + _POWER_TOL):
            break
        oracle.full_evals += 1
        (direction,) = torch.autograd.grad(value, origin, image, retain_graph=True)
    return _POWER_MARGIN * size


class Trial(NamedTuple):
    """A point that the constant in use has passed.

    Attributes:
        point: The point.
        value: ``F(point)``.
        lipschitz: The constant, doubled as often as evaluations contradicted it.
    """

    point: Tensor
    value: Tensor
    lipschitz: float


def backtracked(
    oracle: Oracle,
    old: Tensor,
    old_value: Tensor,
    lipschitz: float,
    attempt: Callable[[float], Tensor],
    holds: Callable[[Tensor, Tensor, Tensor, Tensor, float], Judgement],
) -> Trial | Status:
    """Return the point that an attempt reaches with a constant its own evaluation confirms.

    Args:
        oracle: Evaluates F, once per attempt.
        old: Point of a known value.
        old_value: F there.
        lipschitz: Constant to begin with.
        attempt: From a constant to the point that it leads to.
        holds: :func:`cocoercivity_holds` or :func:`slope_holds`.

    Returns:
        The trial, or the failure that no larger constant repairs.
    """
    for _ in range(_MAX_DOUBLINGS):
        point = attempt(lipschitz)
        value = oracle.full(point)
        passed, failure = holds(old, old_value, point, value, lipschitz)
        if passed:
            return Trial(point, value, lipschitz)
        # Counted over the whole run, or a method could creep towards a wall of NaN for ever.
        oracle.nonfinite += not bool(torch.isfinite(value).all())
        if failure is not None:
            return failure
        if oracle.nonfinite > _MAX_NONFINITE:
            break
        lipschitz *= 2
    return Status.NONFINITE


def cocoercivity_holds(
    old: Tensor, old_value: Tensor, new: Tensor, new_value: Tensor, lipschitz: float
) -> Judgement:
    """Test ``<dF, du> >= |dF|^2 / L`` between two points.

    Returns:
        Whether it holds, and the failure that no larger L can repair.
    """
    pair = _pair(old, old_value, new, new_value, lipschitz)
    if pair is None or pair.is_negative:
        return False, pair and Status.NOT_MONOTONE
    if pair.product + pair.noise * pair.size_u >= pair.size_f**2 / lipschitz:
        return True, None
    skew = lipschitz * pair.size_u > _SKEW * pair.size_f
    return False, Status.ASSUMPTION_VIOLATED if skew else None


def slope_holds(
    old: Tensor, old_value: Tensor, new: Tensor, new_value: Tensor, lipschitz: float
) -> Judgement:
    """Test ``|dF| <= L |du|`` and ``<dF, du> >= 0`` between two points.

    Returns:
        Whether the first holds, and the failure when the second does not.
    """
    pair = _pair(old, old_value, new, new_value, lipschitz)
    if pair is None or pair.is_negative:
        return False, pair and Status.NOT_MONOTONE
    return pair.size_f <= lipschitz * pair.size_u + pair.noise, None


class _Pair(NamedTuple):
    """Sizes of ``du`` and ``dF``, their inner product, and the rounding error of ``dF``."""

    size_u: float
    size_f: float
    product: float
    noise: float

    @property
    def is_negative(self) -> bool:
        """Whether the inner product is below zero beyond rounding."""
        return self.product < -(_NEGATIVE * self.size_f + self.noise) * self.size_u


def _pair(
    old: Tensor, old_value: Tensor, new: Tensor, new_value: Tensor, lipschitz: float
) -> _Pair | None:
    """Return the measures of a pair of evaluations; None when the new one is not finite."""
    if not bool(torch.isfinite(new_value).all()):
        return None
    du, df = new - old, new_value - old_value
    scale = norm(old_value) + norm(new_value) + lipschitz * norm(new)
    noise = _NOISE_UNITS * torch.finfo(new.dtype).eps * scale
    return _Pair(norm(du), norm(df), inner(df, du), noise)


def _random_like(point: Tensor) -> Tensor:
    """Return normal entries from a generator of its own, the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
