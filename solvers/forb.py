"""Forward-reflected-backward splitting: one evaluation per step for monotone Lipschitz F.

``z+ = J(z - eta (2 F(z) - F(z-)))`` with ``eta < 1/(2 L)``. Source: spec halpern_solvers 2.4.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from common.config import check_types, positive, within
from solvers.iterate import register
from solvers.lipschitz import backtracked, slope_holds
from solvers.monotone import MonotoneState, arrived, first_state
from solvers.oracle import Oracle
from solvers.solution import Status


@register
@dataclass(frozen=True, kw_only=True)
class ForwardReflectedBackward:
    """The cheapest deterministic method here for operators that are not cocoercive.

    Attributes:
        step_scale: ``eta L`` in (0, 1/2).
    """

    name: ClassVar[str] = "forb"
    step_scale: float = 0.45

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        positive("step_scale", self.step_scale)
        within("step_scale", self.step_scale, 0.0, 0.5)

    def init(self, oracle: Oracle, start: Tensor) -> MonotoneState:
        """Evaluate F at the start, moved onto the domain of G first."""
        return first_state(oracle, start)

    def step(self, oracle: Oracle, state: MonotoneState) -> MonotoneState:
        """Take one reflected step; a contradicted L is doubled and the step repeated."""

        def target(lipschitz: float) -> Tensor:
            # A changed step breaks the reflection, so the method starts afresh from here.
            previous = state.previous if lipschitz == state.lipschitz else state.value
            return state.point - self.step_scale / lipschitz * (2 * state.value - previous)

        def attempt(lipschitz: float) -> Tensor:
            return oracle.resolvent(target(lipschitz), self.step_scale / lipschitz)

        trial = backtracked(oracle, state.point, state.value, state.lipschitz, attempt, slope_holds)
        if isinstance(trial, Status):
            return replace(state, failure=trial)
        eta = self.step_scale / trial.lipschitz
        return arrived(oracle, state, target(trial.lipschitz), eta, trial)
