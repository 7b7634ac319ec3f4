"""Halpern with safeguarded Anderson candidates: extrapolate, keep the step only if it pays.

A candidate from the last residual differences is accepted when it shrinks the residual by the
safeguard factor, and becomes the new anchor; otherwise a Halpern step is taken, so that the
method never does worse than its fallback. Source: spec bound_tightening 6.3.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.config import within
from common.errors import ConfigError
from solvers.halpern import Halpern, HalpernState
from solvers.iterate import register
from solvers.lipschitz import relaxed
from solvers.oracle import Oracle


@register
@dataclass(frozen=True, kw_only=True)
class AndersonHalpern(Halpern):
    """Halpern with type-II Anderson candidates.

    Attributes:
        memory: Differences kept, at least 1.
        safeguard: A candidate must shrink the residual to this fraction, in (0, 1).
        rcond: Relative cut-off of the least-squares problem.
        relax_lipschitz: Factor on an *estimated* L at an accepted candidate, in (0, 1]; a given
            bound stays.
    """

    name: ClassVar[str] = "halpern_anderson"
    memory: int = 8
    safeguard: float = 0.9
    rcond: float = 1e-8
    relax_lipschitz: float = 0.7

    def __post_init__(self) -> None:
        """Validate the settings."""
        Halpern.__post_init__(self)
        if self.memory < 1:
            raise ConfigError(f"memory={self.memory}: expected at least 1")
        within("safeguard", self.safeguard, 1e-6, 1 - 1e-6)
        within("rcond", self.rcond, 0.0, 0.1)
        within("relax_lipschitz", self.relax_lipschitz, 1e-3, 1.0)

    def step(self, oracle: Oracle, state: HalpernState) -> HalpernState:
        """Try the extrapolated point; fall back to one Halpern step."""
        residual = _residual_vector(oracle, state)
        following = self._candidate(oracle, state, residual) if state.memory else None
        if following is None:
            following = self._halpern_step(oracle, state)
        if following.failure is not None:
            return following
        memory = (*state.memory, (state.iterate, residual))[-self.memory :]
        # With a resolvent the residual map depends on L, so pairs of another L are useless.
        if oracle.has_resolvent and following.lipschitz != state.lipschitz:
            memory = ()
        return replace(following, memory=memory)

    def _candidate(
        self, oracle: Oracle, state: HalpernState, residual: Tensor
    ) -> HalpernState | None:
        flat = residual.flatten()
        points = torch.stack([(state.iterate - old).flatten() for old, _ in state.memory], 1)
        residuals = torch.stack([flat - old.flatten() for _, old in state.memory], 1)
        weights = _least_squares(residuals, flat, self.rcond)
        if weights is None:
            return None
        move = points @ weights + (flat - residuals @ weights) / state.lipschitz
        point = state.iterate - move.view_as(state.iterate)
        value = oracle.full(point)
        if not bool(torch.isfinite(value).all()):
            return None
        following = self._state(oracle, point, value, state.lipschitz, anchor=point)
        if following.residual > self.safeguard * state.residual:
            return None
        lipschitz = relaxed(oracle, state.lipschitz, self.relax_lipschitz)
        if lipschitz != state.lipschitz:
            following = self._state(oracle, point, value, lipschitz, anchor=point)
        return replace(following, restarts=state.restarts + 1, reference=following.residual)


def _residual_vector(oracle: Oracle, state: HalpernState) -> Tensor:
    """Return ``F(u)`` or, with a resolvent, ``(u - J(u - eta F(u))) / eta``."""
    if state.normal is None:
        return state.iterate_value
    return state.iterate_value + state.normal


def _least_squares(columns: Tensor, target: Tensor, rcond: float) -> Tensor | None:
    """Return the minimiser of ``|columns w - target|`` by a truncated SVD; None if not finite."""
    if not bool(torch.isfinite(columns).all()):
        return None
    left, sizes, right = torch.linalg.svd(columns, full_matrices=False)
    keep = sizes > rcond * sizes.max()
    inverse = torch.where(keep, 1 / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 0.0)
    weights = right.mT @ (inverse * (left.mT @ target))
    return weights if bool(torch.isfinite(weights).all()) else None
