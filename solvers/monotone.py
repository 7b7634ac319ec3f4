"""What the methods for monotone Lipschitz operators share: their state, its start, its advance."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from solvers.lipschitz import Trial, first_lipschitz
from solvers.oracle import Oracle
from solvers.solution import State, Status
from solvers.structure import norm


@dataclass(frozen=True, kw_only=True)
class MonotoneState(State):
    """State whose residual is exact at every step.

    Attributes:
        value: ``F(point)``.
        previous: ``F`` at the point before (forward-reflected-backward only).
        anchor: ``z_0`` of the current restart (anchored methods only).
        count: ``k`` since the restart.
        reference: Residual at the restart.
        scale: ``eta L`` of a method whose step varies.
    """

    value: Tensor
    previous: Tensor
    anchor: Tensor
    count: int = 0
    reference: float = float("inf")
    scale: float = 1.0


def first_state(oracle: Oracle, start: Tensor) -> MonotoneState:
    """Return the state at the start, which is first moved onto the domain of G.

    Raises:
        ConfigError: for an operator that is not finite there.
    """
    point = oracle.resolvent(start, 1.0)
    # The resolvent step itself yields an element of G at the point where it lands.
    normal = start - point if oracle.has_resolvent else None
    value = oracle.first_value(point)
    residual = norm(value if normal is None else value + normal)
    return MonotoneState(
        point=point,
        normal=normal,
        residual=residual,
        exact=True,
        lipschitz=first_lipschitz(oracle, point, value),
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
    return arrived(oracle, state, target, eta, Trial(point, value, lipschitz))


def arrived(
    oracle: Oracle, state: MonotoneState, target: Tensor, eta: float, trial: Trial
) -> MonotoneState:
    """Return the state at a trial point ``J(target)``, whose distance to the target is in G."""
    normal = (target - trial.point) / eta if oracle.has_resolvent else None
    return replace(
        state,
        point=trial.point,
        normal=normal,
        residual=norm(trial.value if normal is None else trial.value + normal),
        lipschitz=trial.lipschitz,
        value=trial.value,
        previous=state.value,
        count=state.count + 1,
    )
