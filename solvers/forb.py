"""Forward-reflected-backward splitting: one evaluation per step for monotone Lipschitz F.

``z+ = J(z - eta (2 F(z) - F(z-)))`` with ``eta < 1/(2 L)``. Source: spec halpern_solvers 2.4.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from common.config import check_types, positive, within
from solvers.extragradient import MonotoneState, advance, first_state, slope_holds
from solvers.iterate import register
from solvers.oracle import Oracle
from solvers.solution import Status

_MAX_DOUBLINGS = 40


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
        lipschitz = state.lipschitz
        for _ in range(_MAX_DOUBLINGS):
            eta = self.step_scale / lipschitz
            target = state.point - eta * (2 * state.value - state.previous)
            following = advance(oracle, state, target, eta, lipschitz)
            if following.failure is None:
                holds, failure = slope_holds(
                    state.point, state.value, following.point, following.value, lipschitz
                )
                if failure is not None:
                    return replace(state, failure=failure)
                if holds:
                    return following
            lipschitz *= 2
            # A changed step breaks the reflection, so the method starts afresh from here.
            state = replace(state, previous=state.value)
        return replace(state, failure=Status.NONFINITE)
