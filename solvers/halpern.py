"""Halpern iteration for cocoercive inclusions: plain, reflected and restarted.

The map is ``T = J_eta(I - eta F)`` with ``eta = 2/L``, nonexpansive when F is 1/L-cocoercive;
``u_{k+1} = u_0/(k+2) + (k+1)/(k+2) T u_k`` gives ``|u_k - T u_k| <= 2 |u_0 - u*| / (k+1)``.
Source: spec halpern_solvers 2.1, 2.2, 2.7 (Lieder's rate; arXiv 2310.02987 for the inclusion).
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from common.config import check_types, positive, within
from common.errors import ConfigError
from solvers.iterate import register
from solvers.lipschitz import backtracked, cocoercivity_holds, first_lipschitz, relaxed
from solvers.oracle import Oracle
from solvers.solution import State, Status
from solvers.structure import norm


@dataclass(frozen=True, kw_only=True)
class HalpernState(State):
    """State of every Halpern method.

    Attributes:
        iterate: ``u_k``.
        iterate_value: ``F(u_k)``.
        mapped: ``T u_k``.
        anchor: ``u_0`` of the current restart.
        count: ``k`` since the restart.
        reference: Residual at the restart.
        memory: Pairs (point, residual vector) of the Anderson method.
    """

    iterate: Tensor
    iterate_value: Tensor
    mapped: Tensor
    anchor: Tensor
    count: int = 0
    reference: float = float("inf")
    memory: tuple[tuple[Tensor, Tensor], ...] = field(default=())


@register
@dataclass(frozen=True, kw_only=True)
class Halpern:
    """Plain Halpern with its guarantee; the step follows a growing L where F contradicts it.

    Attributes:
        step_scale: ``eta L`` in (0, 2]; 2 is the longest step that theory allows.
    """

    name: ClassVar[str] = "halpern"
    step_scale: float = 2.0

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        positive("step_scale", self.step_scale)
        within("step_scale", self.step_scale, 0.0, 2.0)

    @property
    def relaxation(self) -> float:
        """Weight ``rho`` of ``T = (1 + rho) J - rho I``; 0 is the plain forward-backward map."""
        return 0.0

    def init(self, oracle: Oracle, start: Tensor) -> HalpernState:
        """Evaluate F at the start and choose the first L.

        Raises:
            ConfigError: for a problem that is declared not cocoercive, or F not finite.
        """
        if oracle.problem.cocoercive is False:
            raise ConfigError(
                f"method={self.name}: needs a cocoercive operator, and this problem is declared "
                "not to be one; use method=extragradient or method=forb"
            )
        value = oracle.first_value(start)
        state = self._state(oracle, start, value, first_lipschitz(oracle, start, value), start)
        return replace(state, reference=state.residual)

    def step(self, oracle: Oracle, state: HalpernState) -> HalpernState:
        """Return the next state: one evaluation, plus one for each time L is doubled."""
        return self._halpern_step(oracle, state)

    def _halpern_step(self, oracle: Oracle, state: HalpernState) -> HalpernState:
        weight, old, old_value = 1 / (state.count + 2), state.iterate, state.iterate_value

        def attempt(lipschitz: float) -> Tensor:
            mapped = state.mapped
            if lipschitz != state.lipschitz:
                mapped = self._map(oracle, old, old_value, lipschitz)[0]
            return weight * state.anchor + (1 - weight) * mapped

        trial = backtracked(oracle, old, old_value, state.lipschitz, attempt, cocoercivity_holds)
        if isinstance(trial, Status):
            return replace(state, failure=trial)
        return replace(
            self._state(oracle, *trial, anchor=state.anchor),
            count=state.count + 1,
            reference=state.reference,
            restarts=state.restarts,
        )

    def _map(
        self, oracle: Oracle, point: Tensor, value: Tensor, lipschitz: float
    ) -> tuple[Tensor, Tensor, float]:
        """Return ``T u``, the forward-backward point ``v`` and ``eta``."""
        eta = self.step_scale / lipschitz
        backward = oracle.resolvent(point - eta * value, eta)
        mapped = backward
        if self.relaxation:
            mapped = (1 + self.relaxation) * backward - self.relaxation * point
        return mapped, backward, eta

    def _state(
        self, oracle: Oracle, point: Tensor, value: Tensor, lipschitz: float, anchor: Tensor
    ) -> HalpernState:
        mapped, backward, eta = self._map(oracle, point, value, lipschitz)
        common: dict[str, Any] = {"lipschitz": lipschitz, "iterate": point, "anchor": anchor}
        common |= {"iterate_value": value, "mapped": mapped}
        if not oracle.has_resolvent:
            return HalpernState(
                point=point, normal=None, residual=norm(value), exact=True, value=value, **common
            )
        # |F(v) + normal| <= |u - v| / eta when F is cocoercive and eta <= 2/L (spec 1.4).
        normal = (point - eta * value - backward) / eta
        residual = norm(point - backward) / eta
        return HalpernState(point=backward, normal=normal, residual=residual, exact=False, **common)


@register
@dataclass(frozen=True, kw_only=True)
class ReflectedHalpern(Halpern):
    """Halpern on the over-relaxed forward-backward map ``(1 + rho) J - rho I``.

    A step ``eta < 2/L`` makes ``J`` averaged, and ``rho = 1 - eta L / 2`` is the largest
    relaxation that stays nonexpansive; as ``eta L`` falls to 0 it becomes that of ``2 J - I``.
    """

    name: ClassVar[str] = "halpern_reflected"
    step_scale: float = 1.0

    @property
    def relaxation(self) -> float:
        """Largest admissible relaxation, ``1 - eta L / 2``."""
        return 1 - self.step_scale / 2


@register
@dataclass(frozen=True, kw_only=True)
class RestartedHalpern(Halpern):
    """Halpern that moves its anchor whenever the residual has shrunk by ``restart_factor``.

    Attributes:
        restart_factor: Residual ratio that triggers a restart, in (0, 1).
        relax_lipschitz: Factor on an *estimated* L at a restart, in (0, 1]; a given bound stays.
    """

    name: ClassVar[str] = "halpern_restarted"
    restart_factor: float = 0.5
    relax_lipschitz: float = 0.7

    def __post_init__(self) -> None:
        """Validate the settings."""
        Halpern.__post_init__(self)
        within("restart_factor", self.restart_factor, 1e-6, 1 - 1e-6)
        within("relax_lipschitz", self.relax_lipschitz, 1e-3, 1.0)

    def step(self, oracle: Oracle, state: HalpernState) -> HalpernState:
        """Take a Halpern step, then restart when the residual has shrunk enough."""
        following = self._halpern_step(oracle, state)
        if following.residual > self.restart_factor * state.reference:
            return following
        lipschitz = relaxed(oracle, following.lipschitz, self.relax_lipschitz)
        point, value = following.iterate, following.iterate_value
        fresh = self._state(oracle, point, value, lipschitz, anchor=point)
        return replace(fresh, reference=fresh.residual, restarts=state.restarts + 1)
