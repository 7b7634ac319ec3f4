"""Extragradient methods for monotone Lipschitz inclusions, also those that are not cocoercive.

``extragradient`` is the classical method of Korpelevich; ``anchored_extragradient`` adds the
Halpern anchor: ``|F(z_k)| <= 2 L |z_0 - z*| / k`` without a resolvent (FEG), and O(1/k) with one
(EAG-C). Source: spec halpern_solvers 2.4 and 2.7.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.config import check_types, positive, within
from solvers.iterate import State, register
from solvers.oracle import Oracle
from solvers.solution import Status
from solvers.structure import inner, norm

_NOISE_UNITS = 16.0  # rounding allowance of the slope test, in units of eps
_NEGATIVE = 1e-10  # relative size of an inner product that counts as negative
_MAX_DOUBLINGS = 40


@dataclass(frozen=True, kw_only=True)
class MonotoneState(State):
    """State of the methods for monotone Lipschitz operators.

    Attributes:
        value: ``F(point)``.
        previous: ``F`` at the point before (forward-reflected-backward only).
        anchor: ``z_0`` of the current restart (anchored method only).
        count: ``k`` since the restart.
        reference: Residual at the restart.
    """

    value: Tensor
    previous: Tensor
    anchor: Tensor
    count: int = 0
    reference: float = float("inf")


@register
@dataclass(frozen=True, kw_only=True)
class Extragradient:
    """Two evaluations per step, last-iterate convergence, no rate on the residual.

    Attributes:
        step_scale: ``eta L`` in (0, 1).
    """

    name: ClassVar[str] = "extragradient"
    step_scale: float = 0.9

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        positive("step_scale", self.step_scale)
        within("step_scale", self.step_scale, 0.0, 1.0)

    def init(self, oracle: Oracle, start: Tensor) -> MonotoneState:
        """Evaluate F at the start, moved onto the domain of G first.

        Raises:
            ConfigError: for an operator that is not finite there.
        """
        return first_state(oracle, start)

    def step(self, oracle: Oracle, state: MonotoneState) -> MonotoneState:
        """Step to a half point and use its value from where the step began."""
        return self._step(oracle, state, state.point, self.step_scale, self.step_scale)

    def _step(
        self, oracle: Oracle, state: MonotoneState, base: Tensor, half: float, full: float
    ) -> MonotoneState:
        lipschitz = state.lipschitz
        for _ in range(_MAX_DOUBLINGS):
            middle = oracle.resolvent(base - half / lipschitz * state.value, half / lipschitz)
            middle_value = oracle.full(middle)
            holds, failure = slope_holds(state.point, state.value, middle, middle_value, lipschitz)
            if failure is not None:
                return replace(state, failure=failure)
            if holds:
                eta = full / lipschitz
                target = base - eta * middle_value
                return advance(oracle, state, target, eta, lipschitz)
            lipschitz *= 2
        return replace(state, failure=Status.NONFINITE)


@register
@dataclass(frozen=True, kw_only=True)
class AnchoredExtragradient(Extragradient):
    """Extragradient with an anchor, restarted when the residual has shrunk enough.

    Attributes:
        step_scale: ``eta L`` with a resolvent; without one the step is ``1/L``.
        restart_factor: Residual ratio that moves the anchor, in [0, 1); 0 never does.
    """

    name: ClassVar[str] = "anchored_extragradient"
    step_scale: float = 0.57
    restart_factor: float = 0.5

    def __post_init__(self) -> None:
        """Validate the settings."""
        Extragradient.__post_init__(self)
        within("restart_factor", self.restart_factor, 0.0, 1 - 1e-6)

    def step(self, oracle: Oracle, state: MonotoneState) -> MonotoneState:
        """Take an anchored step, then restart when the residual has shrunk enough."""
        if oracle.has_resolvent:
            weight, half, full = 1 / (state.count + 2), self.step_scale, self.step_scale
        else:
            weight = 1 / (state.count + 1)
            half, full = 1 - weight, 1.0
        base = weight * state.anchor + (1 - weight) * state.point
        following = self._step(oracle, state, base, half, full)
        if following.failure is None and following.residual <= (
            self.restart_factor * state.reference
        ):
            return replace(
                following,
                anchor=following.point,
                count=0,
                reference=following.residual,
                restarts=state.restarts + 1,
            )
        return following


def first_state(oracle: Oracle, start: Tensor) -> MonotoneState:
    """Return the state at the start, which is first moved onto the domain of G.

    Raises:
        ConfigError: for an operator that is not finite there.
    """
    point = oracle.resolvent(start, 1.0)
    # The resolvent step itself yields an element of G at the point where it lands.
    normal = start - point if oracle.has_resolvent else None
    value = oracle.first_value(point)
    known = (oracle.problem.lipschitz_bound, oracle.problem.lipschitz_est)
    lipschitz = next((c for c in known if c is not None), None)
    if lipschitz is None:
        lipschitz = oracle.lipschitz_est(point, value)
    residual = norm(value if normal is None else value + normal)
    return MonotoneState(
        point=point,
        normal=normal,
        residual=residual,
        exact=True,
        lipschitz=lipschitz or 1.0,
        value=value,
        previous=value,
        anchor=point,
        reference=residual,
    )


def advance(
    oracle: Oracle, state: MonotoneState, target: Tensor, eta: float, lipschitz: float
) -> MonotoneState:
    """Return the state at ``J(target)`` with its exact residual; one evaluation."""
    point = oracle.resolvent(target, eta)
    value = oracle.full(point)
    if not bool(torch.isfinite(value).all()):
        return replace(state, failure=Status.NONFINITE)
    normal = (target - point) / eta if oracle.has_resolvent else None
    return replace(
        state,
        point=point,
        normal=normal,
        residual=norm(value if normal is None else value + normal),
        lipschitz=lipschitz,
        value=value,
        previous=state.value,
        count=state.count + 1,
    )


def slope_holds(
    old: Tensor, old_value: Tensor, new: Tensor, new_value: Tensor, lipschitz: float
) -> tuple[bool, Status | None]:
    """Test ``|dF| <= L |du|`` and ``<dF, du> >= 0`` between two points.

    Returns:
        Whether the first holds, and the failure when the second does not.
    """
    if not bool(torch.isfinite(new_value).all()):
        return False, None
    du, df = new - old, new_value - old_value
    size_u, size_f = norm(du), norm(df)
    unit = torch.finfo(new.dtype).eps
    noise = _NOISE_UNITS * unit * (norm(old_value) + norm(new_value) + lipschitz * norm(new))
    if inner(df, du) < -_NEGATIVE * size_f * size_u - noise * size_u:
        return False, Status.NOT_MONOTONE
    return size_f <= lipschitz * size_u + noise, None
