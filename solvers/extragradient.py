"""Extragradient methods for monotone Lipschitz inclusions, also those that are not cocoercive.

``extragradient`` is the classical method of Korpelevich. The others add the Halpern anchor:
``feg`` (fast extragradient, ``|F(z_k)| <= 2 L |z_0 - z*| / k``, no resolvent), ``eag`` (constant
step, O(1/k) with a resolvent too) and ``eag_v`` (varying step).
Source: spec halpern_solvers 2.4 and 2.7.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from common.config import check_types, positive, within
from common.errors import ConfigError
from solvers.iterate import register
from solvers.lipschitz import Trial, backtracked, relaxed, slope_holds
from solvers.monotone import MonotoneState, advance, first_state
from solvers.oracle import Oracle
from solvers.solution import Status

_LONGEST_VARYING = 0.75  # eta L up to which the steps of EAG-V have a positive limit


@register
@dataclass(frozen=True, kw_only=True)
class Extragradient:
    """Two evaluations per step, last-iterate convergence, no rate on the residual.

    Attributes:
        step_scale: ``eta L`` in (0, 1].
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
        """Return ``J(base - full F(h) / L)`` with ``h = J(base - half F(z) / L)``."""

        def attempt(lipschitz: float) -> Tensor:
            eta = half / lipschitz
            return oracle.resolvent(base - eta * state.value, eta)

        old, value, lipschitz = state.point, state.value, state.lipschitz
        trial: Trial | Status = Trial(old, value, lipschitz)
        if half:
            trial = backtracked(oracle, old, value, lipschitz, attempt, slope_holds)
        if isinstance(trial, Status):
            return replace(state, failure=trial)
        eta = full / trial.lipschitz
        return advance(oracle, state, base - eta * trial.value, eta, trial.lipschitz)


@dataclass(frozen=True, kw_only=True)
class Anchored(Extragradient, ABC):
    """An extragradient method with an anchor, which moves when the residual has shrunk enough.

    Attributes:
        restart_factor: Residual ratio that moves the anchor, in [0, 1); 0 never does.
        relax_lipschitz: Factor on an *estimated* L at a restart, in (0, 1]; a given bound stays.
    """

    restart_factor: float = 0.5
    relax_lipschitz: float = 0.7

    def __post_init__(self) -> None:
        """Validate the settings."""
        Extragradient.__post_init__(self)
        within("restart_factor", self.restart_factor, 0.0, 1 - 1e-6)
        within("relax_lipschitz", self.relax_lipschitz, 1e-3, 1.0)

    @abstractmethod
    def _weights(self, state: MonotoneState) -> tuple[float, float, float]:
        """Return the weight of the anchor and ``eta L`` of the half and the full step."""

    def step(self, oracle: Oracle, state: MonotoneState) -> MonotoneState:
        """Take an anchored step, then restart when the residual has shrunk enough."""
        weight, half, full = self._weights(state)
        base = weight * state.anchor + (1 - weight) * state.point
        following = self._step(oracle, state, base, half, full)
        restarts = following.residual <= self.restart_factor * state.reference
        if following.failure is not None or not restarts:
            return following
        return replace(
            following,
            anchor=following.point,
            count=0,
            reference=following.residual,
            lipschitz=relaxed(oracle, following.lipschitz, self.relax_lipschitz),
            restarts=state.restarts + 1,
        )


@register
@dataclass(frozen=True, kw_only=True)
class FastExtragradient(Anchored):
    """FEG: the default for monotone operators without a resolvent; its step is ``1/L``."""

    name: ClassVar[str] = "feg"
    step_scale: float = 1.0

    def init(self, oracle: Oracle, start: Tensor) -> MonotoneState:
        """Evaluate F at the start.

        Raises:
            ConfigError: for a problem with a resolvent, or an operator that is not finite.
        """
        _refuse_resolvent(self.name, oracle)
        return first_state(oracle, start)

    def _weights(self, state: MonotoneState) -> tuple[float, float, float]:
        weight = 1 / (state.count + 1)
        return weight, (1 - weight) * self.step_scale, self.step_scale


@register
@dataclass(frozen=True, kw_only=True)
class AnchoredExtragradient(Anchored):
    """EAG-C: the default for monotone operators with a resolvent.

    The rate is proved for ``eta L <= 1/8`` without a resolvent and below ``1/sqrt(3)`` with one.
    """

    name: ClassVar[str] = "eag"
    step_scale: float = 0.57

    def _weights(self, state: MonotoneState) -> tuple[float, float, float]:
        return 1 / (state.count + 2), self.step_scale, self.step_scale


@register
@dataclass(frozen=True, kw_only=True)
class VaryingAnchoredExtragradient(Anchored):
    """EAG-V: as EAG-C with steps that fall to a limit, proved without a resolvent.

    ``|F(z_k)| <= sqrt(27) L |z_0 - z*| / sqrt((k+1)(k+2))`` for ``step_scale <= 0.618``; above
    3/4 the rule that shortens the steps makes them zero or negative.
    """

    name: ClassVar[str] = "eag_v"
    step_scale: float = 0.618

    def __post_init__(self) -> None:
        """Validate the settings."""
        Anchored.__post_init__(self)
        within("step_scale", self.step_scale, 0.0, _LONGEST_VARYING)

    def init(self, oracle: Oracle, start: Tensor) -> MonotoneState:
        """Evaluate F at the start.

        Raises:
            ConfigError: for a problem with a resolvent, or an operator that is not finite.
        """
        _refuse_resolvent(self.name, oracle)
        return replace(first_state(oracle, start), scale=self.step_scale)

    def step(self, oracle: Oracle, state: MonotoneState) -> MonotoneState:
        """Take an anchored step and shorten the next one."""
        following = Anchored.step(self, oracle, state)
        square = state.scale**2
        shrink = 1 - square / ((state.count + 1) * (state.count + 3) * (1 - square))
        is_fresh = following.count == 0
        return replace(following, scale=self.step_scale if is_fresh else state.scale * shrink)

    def _weights(self, state: MonotoneState) -> tuple[float, float, float]:
        return 1 / (state.count + 2), state.scale, state.scale


def _refuse_resolvent(name: str, oracle: Oracle) -> None:
    if oracle.has_resolvent:
        raise ConfigError(
            f"method={name}: its rate is proved without a resolvent, and this problem has one; "
            "use method=eag"
        )
