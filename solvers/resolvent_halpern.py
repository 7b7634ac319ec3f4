"""Halpern iteration on the resolvent of ``eta (F + G)``, for monotone Lipschitz operators.

``u_{k+1} = u_0/(k+2) + (k+1)/(k+2) J(u_k)`` gives ``|u_k - J(u_k)| <= 2 |u_0 - u*| / (k+1)``, half
of it when ``2 J - I`` is anchored. ``J`` is solved by forward-reflected-backward steps until the
error that strong monotonicity proves is small enough. Source: spec halpern_solvers 2.3 and 2.6.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from common.config import check_types, positive, within
from solvers.forb import ForwardReflectedBackward
from solvers.iterate import register
from solvers.monotone import MonotoneState, first_state
from solvers.oracle import Oracle
from solvers.problem import Inclusion
from solvers.solution import Status
from solvers.structure import norm

_MOST_INNER = 200.0  # inner steps in units of the inner condition number before giving up
_INNER = ForwardReflectedBackward()


@dataclass(frozen=True, kw_only=True)
class ResolventState(MonotoneState):
    """State after one resolvent; ``point`` is its output.

    Attributes:
        iterate: ``u_k``, the argument of the next resolvent.
        gap: ``|u_{k-1} - J(u_{k-1})|``, the quantity of the theorem.
    """

    iterate: Tensor
    gap: float = math.inf


@register
@dataclass(frozen=True, kw_only=True)
class ResolventHalpern:
    """The deterministic form of ``inexact_halpern``; one step of the loop is one resolvent.

    Attributes:
        step_scale: ``eta L``; larger values need fewer but harder resolvents.
        accuracy: The error of the k-th resolvent is at most ``accuracy / (k+2)`` of its move.
        reflect: Anchor ``2 J - I``.
        restart_factor: Residual ratio that moves the anchor, in [0, 1); 0 never does.
    """

    name: ClassVar[str] = "halpern_resolvent"
    step_scale: float = 8.0
    accuracy: float = 0.5
    reflect: bool = False
    restart_factor: float = 0.5

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        positive("step_scale", self.step_scale)
        positive("accuracy", self.accuracy)
        within("restart_factor", self.restart_factor, 0.0, 1 - 1e-6)

    def init(self, oracle: Oracle, start: Tensor) -> ResolventState:
        """Evaluate F at the start, moved onto the domain of G first.

        Raises:
            ConfigError: for an operator that is not finite there.
        """
        first = first_state(oracle, start)
        return ResolventState(**vars(first), iterate=first.point)

    def step(self, oracle: Oracle, state: ResolventState) -> ResolventState:
        """Solve one resolvent, anchor it, then restart when the residual has shrunk enough."""
        inner = self._resolved(oracle, state)
        if inner.failure is not None:
            return replace(state, failure=inner.failure)
        eta, centre = self.step_scale / state.lipschitz, state.iterate
        weight, moved = 1 / (state.count + 2), inner.point - centre
        mapped = inner.point + moved if self.reflect else inner.point
        value = (inner.value - moved) / eta
        normal = None if inner.normal is None else inner.normal / eta
        following = replace(
            state,
            point=inner.point,
            value=value,
            normal=normal,
            residual=norm(value if normal is None else value + normal),
            lipschitz=max(state.lipschitz, (inner.lipschitz - 1) / eta),
            iterate=weight * state.anchor + (1 - weight) * mapped,
            count=state.count + 1,
            gap=norm(moved),
        )
        if following.residual > self.restart_factor * state.reference:
            return following
        return replace(
            following,
            iterate=inner.point,
            anchor=inner.point,
            count=0,
            reference=following.residual,
            restarts=state.restarts + 1,
        )

    def _resolved(self, oracle: Oracle, state: ResolventState) -> MonotoneState:
        """Return ``J(u_k)`` as the state that solves ``0 in v - u_k + eta (F + G)(v)``."""
        eta = self.step_scale / state.lipschitz
        regularised = Oracle(_regularised(oracle, state.iterate, eta))
        regularised.nonfinite = oracle.nonfinite
        # The resolvent before is the best guess, and F is known there.
        value = state.point - state.iterate + eta * state.value
        inner = MonotoneState(
            point=state.point,
            normal=None if state.normal is None else eta * state.normal,
            residual=math.inf,
            exact=True,
            lipschitz=1 + self.step_scale,
            value=value,
            previous=value,
            anchor=state.point,
        )
        for _ in range(math.ceil(_MOST_INNER * (1 + self.step_scale))):
            inner = _INNER.step(regularised, inner)
            oracle.nonfinite = regularised.nonfinite
            # The inner operator is 1-strongly monotone, so its residual bounds the error.
            moved = norm(inner.point - state.iterate) - inner.residual
            if inner.residual <= self.accuracy / (state.count + 2) * moved:
                return inner
            if inner.failure is not None:
                return inner
        return replace(inner, failure=Status.STALLED)


def _regularised(oracle: Oracle, centre: Tensor, eta: float) -> Inclusion:
    """Return the inclusion of the resolvent on packed points; the given oracle counts."""

    def resolvent(point: Tensor, step: float) -> Tensor:
        return oracle.resolvent(point, step * eta)

    return Inclusion(
        operator=lambda point: point - centre + eta * oracle.full(point),
        start=centre,
        resolvent=resolvent if oracle.has_resolvent else None,
    )
