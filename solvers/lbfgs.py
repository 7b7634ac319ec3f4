"""Limited-memory BFGS on a gradient: the benchmark opponent of the Halpern methods.

Needs the operator to be the gradient of a convex function, no resolvent, and nothing else: the
line search uses slopes only (approximate Wolfe conditions), because on a convex function the
slope along a line tells on which side of the minimum a point lies. It has no rate guarantee on
the residual and does not apply to operators that are not gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.config import check_types
from common.errors import ConfigError
from solvers.iterate import register
from solvers.lipschitz import first_lipschitz
from solvers.oracle import Oracle
from solvers.solution import State, Status
from solvers.structure import inner, norm

_UPPER = 0.8  # accepted slope above zero, relative to the first slope
_LOWER = 0.9  # accepted slope below zero
_FALLING = 1.0 + 1e-6  # slope relative to the first one that no convex function has ahead
_MAX_TRIALS = 30
_CURVATURE = 1e-12  # pairs with a smaller relative curvature are not kept


@dataclass(frozen=True, kw_only=True)
class LbfgsState(State):
    """Point, its gradient in ``value`` and the kept pairs (step, gradient change)."""

    value: Tensor
    pairs: tuple[tuple[Tensor, Tensor], ...] = field(default=())


@register
@dataclass(frozen=True, kw_only=True)
class Lbfgs:
    """Quasi-Newton descent for gradients of convex functions.

    Attributes:
        memory: Pairs kept, at least 1.
    """

    name: ClassVar[str] = "lbfgs"
    memory: int = 10

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        if self.memory < 1:
            raise ConfigError(f"memory={self.memory}: expected at least 1")

    def init(self, oracle: Oracle, start: Tensor) -> LbfgsState:
        """Evaluate the gradient at the start.

        Raises:
            ConfigError: for a problem with a resolvent, or a gradient that is not finite.
        """
        if oracle.has_resolvent:
            raise ConfigError("method=lbfgs: cannot handle a resolvent; use method=halpern")
        value = oracle.first_value(start)
        return LbfgsState(
            point=start,
            normal=None,
            residual=norm(value),
            exact=True,
            lipschitz=first_lipschitz(oracle, start, value),
            value=value,
        )

    def step(self, oracle: Oracle, state: LbfgsState) -> LbfgsState:
        """Search along the quasi-Newton direction, or along the gradient when that fails."""
        if state.residual == 0:
            return state
        failure = Status.ASSUMPTION_VIOLATED
        for pairs in (state.pairs, ()):
            direction = -_inverse_hessian(state.value, pairs, state.lipschitz)
            found = _search(oracle, state, direction)
            if not isinstance(found, Status):
                return self._accept(state, pairs, *found)
            failure = found
        return replace(state, failure=failure)

    def _accept(
        self,
        state: LbfgsState,
        pairs: Sequence[tuple[Tensor, Tensor]],
        point: Tensor,
        value: Tensor,
    ) -> LbfgsState:
        move, change = point - state.point, value - state.value
        if inner(move, change) > _CURVATURE * norm(move) * norm(change):
            pairs = [*pairs, (move, change)][-self.memory :]
        return replace(
            state,
            point=point,
            value=value,
            residual=norm(value),
            pairs=tuple(pairs),
            restarts=state.restarts + (not pairs),
        )


def _inverse_hessian(
    value: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], lipschitz: float
) -> Tensor:
    """Return the two-loop product of the inverse Hessian estimate with ``value``."""
    if not pairs:
        return value / lipschitz
    result, coefficients = value.clone(), []
    for move, change in reversed(pairs):
        coefficient = inner(move, result) / inner(move, change)
        coefficients.append(coefficient)
        result = result - coefficient * change
    move, change = pairs[-1]
    result = result * (inner(move, change) / inner(change, change))
    for (move, change), coefficient in zip(pairs, reversed(coefficients), strict=True):
        result = result + (coefficient - inner(change, result) / inner(move, change)) * move
    return result


def _search(oracle: Oracle, state: LbfgsState, direction: Tensor) -> tuple[Tensor, Tensor] | Status:
    """Return a point along the direction whose slope is close to zero, with its gradient.

    Without one, the failure says what the slopes contradict: convexity where they fall, the
    existence of a minimum where they stay below zero for ever.
    """
    first = inner(state.value, direction)
    if not first < 0:
        return Status.ASSUMPTION_VIOLATED
    low, high, slope_low, slope_high = 0.0, math.inf, first, math.inf
    length = 1.0
    for _ in range(_MAX_TRIALS):
        point = state.point + length * direction
        value = oracle.full(point)
        slope = inner(value, direction)
        if not bool(torch.isfinite(value).all()):
            slope = math.inf
        if _LOWER * first <= slope <= -_UPPER * first:
            return point, value
        if slope < _FALLING * first:
            return Status.NOT_MONOTONE
        if slope < 0:
            low, slope_low = length, slope
        else:
            high, slope_high = length, slope
        length = _next_length(low, high, slope_low, slope_high)
    return Status.NO_SOLUTION_SUSPECTED if math.isinf(high) else Status.ASSUMPTION_VIOLATED


def _next_length(low: float, high: float, slope_low: float, slope_high: float) -> float:
    """Return a doubled length, or a guarded secant point of the bracket."""
    if math.isinf(high):
        return 2 * max(low, 0.5)
    if math.isinf(slope_high):
        return low + 0.25 * (high - low)
    share = -slope_low / (slope_high - slope_low)
    return low + min(0.9, max(0.1, share)) * (high - low)
