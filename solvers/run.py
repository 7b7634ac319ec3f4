"""Bookkeeping of one run: best point, certificate, exits, recovery, the assembled result."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from solvers.exits import Drift, Limits
from solvers.inspection import bad_component
from solvers.oracle import Oracle
from solvers.solution import Result, State, Status, TracePoint
from solvers.structure import norm

_FLOOR_UNITS = 4.0  # rounding floor of a residual in units of eps * L * |u|
_GROWN = (100.0, 1000.0)  # residual over the best and over the first one that means divergence
_RECOVERIES = {Status.NONFINITE: 1, Status.DIVERGED: 10}


class Solver(Protocol):
    """A method: settings only, no mutable state."""

    name: ClassVar[str]

    def init(self, oracle: Oracle, start: Tensor) -> Any:
        """Return the first state."""
        ...

    def step(self, oracle: Oracle, state: Any) -> Any:
        """Return the next state."""
        ...


Callback = Callable[[State, Oracle], bool | None]


class Certificate(NamedTuple):
    """A state whose residual was recomputed: ``F`` at its point, and the norm."""

    state: State
    value: Tensor
    residual: float


class Run:
    """One method on one problem.

    Args:
        oracle: The problem.
        solver: The method.
        start: First point, packed.
        limits: When to stop.
        callback: Asked once per iteration.
    """

    def __init__(
        self,
        oracle: Oracle,
        solver: Solver,
        start: Tensor,
        limits: Limits,
        callback: Callback | None,
    ) -> None:
        self.oracle, self.solver, self.limits, self.callback = oracle, solver, limits, callback
        self.began = time.perf_counter()
        self.state: State = solver.init(oracle, start)
        self.first = self.best = self.state
        self.best_exact: State | None = None
        self.tolerance = limits.atol + limits.rtol * max(self.state.residual, oracle.scale)
        self.drift = Drift(self.state.point, self.state.residual)
        self.iterations = -1
        self.trace: list[TracePoint] = []
        self.recoveries = dict.fromkeys(_RECOVERIES, 0)
        self._retry_below = math.inf
        self._certified: Certificate | None = None
        self._observe(self.state)

    def step(self) -> None:
        """Take one step of the method."""
        self._observe(self.solver.step(self.oracle, self.state))

    def verdict(self) -> Status | None:
        """Return why to stop, or None to continue."""
        state, limits = self.state, self.limits
        if self._callback_stops():
            return Status.STOPPED
        if state.residual <= self.tolerance and state.residual < self._retry_below:
            residual = self.certify(state).residual
            if residual <= self.tolerance:
                return Status.CONVERGED
            # A claim that failed is not tested again before it is good enough for the same error.
            self._retry_below = state.residual * min(0.9, max(0.1, self.tolerance / residual))
        if state.failure is not None:
            return state.failure
        if math.isnan(state.residual):
            return Status.NONFINITE
        if self._has_diverged():
            return Status.DIVERGED
        if self.iterations >= limits.max_iterations:
            return Status.MAX_ITERATIONS
        if limits.max_calls is not None and self.oracle.calls >= limits.max_calls:
            return Status.MAX_CALLS
        if limits.time_limit is not None and self._seconds() >= limits.time_limit:
            return Status.TIME_LIMIT
        if self.tolerance > 0 and state.residual <= _floor(state):
            return Status.STALLED
        if self.drift.suspects(self.iterations, state.point, self.best.residual):
            return Status.NO_SOLUTION_SUSPECTED
        return None

    def recover(self, status: Status) -> bool:
        """Start again from the best certified point with half the step; False to give up."""
        # A method that gives up by itself as diverged has already tried shorter steps.
        is_final = status is Status.DIVERGED and self.state.failure is not None
        if is_final or self.recoveries.get(status, 0) >= _RECOVERIES.get(status, 0):
            return False
        self.recoveries[status] += 1
        self.oracle.lipschitz_floor = 2 * self.state.lipschitz
        best = self._best_certificate().state
        fresh = self.solver.init(self.oracle, best.point)
        self._observe(replace(fresh, restarts=self.state.restarts + 1))
        return True

    def certify(self, state: State) -> Certificate:
        """Return the residual recomputed at the state's point, in float64 where F allows that."""
        found = self._certified
        if found is not None and found.state is state:
            return found
        is_double = state.point.dtype == torch.float64
        value = state.value if is_double and state.value is not None else None
        value = self.oracle.precise(state.point) if value is None else value
        residual = norm(value if state.normal is None else value + state.normal)
        new = Certificate(state, value, residual)
        if found is None or not found.residual <= residual:
            self._certified = new
        return new

    def result(self, status: Status) -> Result:
        """Assemble the result at the best point."""
        oracle, found = self.oracle, self._best_certificate()
        state, unpack = found.state, self.oracle.structure.unpack
        detail = self._detail(status)
        diameter = oracle.diameter()
        drift = self.drift.displacement if status is Status.NO_SOLUTION_SUSPECTED else None
        return Result(
            value=unpack(state.point),
            normal=None if state.normal is None else unpack(state.normal),
            residual=found.residual,
            natural_residual=self._natural_residual(found),
            gap_bound=None if diameter is None else found.residual * diameter,
            status=status,
            method=self.solver.name,
            iterations=self.iterations,
            restarts=self.state.restarts,
            full_evals=oracle.full_evals,
            component_evals=oracle.component_evals,
            oracle_calls=oracle.calls,
            seconds=self._seconds(),
            lipschitz=self.state.lipschitz,
            lipschitz_source=self._lipschitz_source(),
            detail=detail,
            displacement=None if drift is None else unpack(drift),
            trace=tuple(self.trace),
            state=self.state,
        )

    def _observe(self, state: State) -> None:
        self.state = state
        self.iterations += 1
        self.trace.append(TracePoint(self.oracle.calls, state.residual, state.lipschitz))
        if state.residual < self.best.residual:
            self.best = state
        exact = self.best_exact
        if state.exact and (exact is None or state.residual < exact.residual):
            self.best_exact = state

    def _best_certificate(self) -> Certificate:
        """Recompute the best claim and what is exact and better; return the best so far."""
        found = self.certify(self.best)
        exact = self.best_exact
        if exact is not None and exact.residual < found.residual:
            self.certify(exact)
        return self._certified or found

    def _callback_stops(self) -> bool:
        try:
            return self.callback is not None and bool(self.callback(self.state, self.oracle))
        except KeyboardInterrupt:
            return True

    def _has_diverged(self) -> bool:
        state = self.state
        limit = max(_GROWN[0] * self.best.residual, _GROWN[1] * self.first.residual)
        return state.exact and not state.residual <= max(limit, self.tolerance)

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def _lipschitz_source(self) -> str:
        if self.state.lipschitz != self.first.lipschitz:
            return "backtracked"
        return self.oracle.lipschitz_source

    def _natural_residual(self, found: Certificate) -> float:
        if not self.oracle.has_resolvent:
            return found.residual
        point, lipschitz = found.state.point, found.state.lipschitz
        target = point - (found.value / lipschitz).to(point)
        return lipschitz * norm(point - self.oracle.resolvent(target, 1 / lipschitz))

    def _detail(self, status: Status) -> str:
        """Return what else the user should know, in sentences."""
        notes = [self.first.detail]
        if self.state.detail != self.first.detail:
            notes.append(self.state.detail)
        if status is Status.STALLED:
            kind = str(self.state.point.dtype).removeprefix("torch.")
            floor = f"{_floor(self.state):.1e}"
            notes.append(f"The floor of {kind} is {floor} here; raise the tolerance.")
        if status is Status.NONFINITE and self.oracle.last is not None:
            component = bad_component(self.oracle, self.oracle.last)
            if component is not None:
                notes.append(f"Component {component} is the first to be so.")
        return " ".join(filter(None, notes))


def _floor(state: State) -> float:
    """Return the residual below which rounding of the point's dtype hides all progress."""
    unit = torch.finfo(state.point.dtype).eps
    return _FLOOR_UNITS * unit * state.lipschitz * norm(state.point)
