"""The one loop that drives every method, and the verb ``solve``.

A method is an immutable object with ``init`` and ``step``; the loop decides when to stop and
recomputes the residual before it says that a method has converged.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from common.config import one_of, positive
from common.errors import ConfigError
from solvers.oracle import Oracle
from solvers.problem import Problem
from solvers.solution import Result, Status, TracePoint
from solvers.structure import Value, norm

_FLOOR_UNITS = 4.0  # rounding floor of a residual in units of eps * L * |u|


@dataclass(frozen=True, kw_only=True)
class State:
    """What the loop reads of a method's state; methods extend it.

    Attributes:
        point: Candidate solution.
        normal: Element of ``G(point)``; None when ``G = 0``.
        residual: Estimate of ``|F(point) + normal|``; exact where ``exact``.
        exact: Whether ``residual`` comes from a full evaluation at ``point``.
        lipschitz: Constant in use.
        restarts: Times the anchor was moved.
        failure: Set when the method cannot continue.
    """

    point: Tensor
    normal: Tensor | None
    residual: float
    exact: bool
    lipschitz: float
    restarts: int = 0
    failure: Status | None = None


class Solver(Protocol):
    """A method: settings only, no mutable state."""

    name: str

    def init(self, oracle: Oracle, start: Tensor) -> Any:
        """Return the first state."""
        ...

    def step(self, oracle: Oracle, state: Any) -> Any:
        """Return the next state."""
        ...


Callback = Callable[[State, Oracle], bool | None]
SOLVERS: dict[str, type] = {}


def register(cls: type) -> type:
    """Class decorator that makes a method known under its ``name``."""
    SOLVERS[cls.name] = cls  # type: ignore[attr-defined]
    return cls


def make_solver(method: str, **options: Any) -> Solver:
    """Return the method of this name with the given settings.

    Raises:
        ConfigError: for an unknown name or setting.
    """
    one_of("method", method, sorted(SOLVERS))
    try:
        return SOLVERS[method](**options)
    except TypeError as error:
        raise ConfigError(f"method={method}: {error}; correct its options") from error


@torch.no_grad()
def iterate(
    problem: Problem,
    solver: Solver,
    *,
    start: Value | None = None,
    atol: float = 1e-6,
    rtol: float = 0.0,
    max_iterations: int = 100_000,
    max_calls: int | None = None,
    callback: Callback | None = None,
    throw: bool = False,
) -> Result:
    """Run a method until the recomputed residual is at most ``atol + rtol * first residual``.

    Args:
        problem: The inclusion.
        solver: The method.
        start: Replaces ``problem.start`` (warm start); it becomes the anchor.
        atol: Absolute tolerance, >= 0.
        rtol: Relative tolerance, >= 0.
        max_iterations: Limit of steps.
        max_calls: Limit of component evaluations, None for none; checked between steps.
        callback: Called with (state, oracle) once per iteration; a true value stops.
        throw: Raise instead of returning a result that has not converged.

    Returns:
        The best point with its residual; never a residual that was not recomputed there.

    Raises:
        ConfigError: for impossible tolerances or limits, or an operator that is not finite.
        ConvergenceError: only with ``throw``.
    """
    positive("atol", atol, zero=True)
    positive("rtol", rtol, zero=True)
    positive("max_iterations", max_iterations, zero=True)
    began = time.perf_counter()
    oracle = Oracle(problem)
    first = oracle.structure.pack(problem.start if start is None else start, "start")
    state = solver.init(oracle, first)
    run = _Run(oracle, state, atol + rtol * state.residual)
    while (status := run.verdict(state, max_iterations, max_calls, callback)) is None:
        state = solver.step(oracle, state)
        run.observe(state)
    result = run.result(status, state, solver.name, time.perf_counter() - began)
    return result.raise_for_status() if throw else result


def solve(problem: Problem, method: str = "halpern_restarted", **settings: Any) -> Result:
    """Solve an inclusion by a method of the registry.

    Args:
        problem: What to solve.
        method: A key of ``SOLVERS``.
        **settings: Arguments of :func:`iterate`; all others go to the method.

    Returns:
        The result; see :class:`solvers.solution.Result`.

    Raises:
        ConfigError: for an unknown method or option, or a problem that the method refuses.
        ConvergenceError: only with ``throw=True``.
    """
    of_loop = {key: settings.pop(key) for key in tuple(settings) if key in _LOOP_SETTINGS}
    return iterate(problem, make_solver(method, **settings), **of_loop)


def continuation(
    stages: Sequence[Callable[[Tensor], Problem]],
    solver: Solver,
    start: Tensor,
    *,
    callback: Callback,
    stage_rtol: float = 0.1,
    last_rtol: float = 1e-3,
    max_iterations: int = 100_000,
) -> tuple[Result, ...]:
    """Solve a sequence of problems, each started where the one before ended.

    Args:
        stages: Functions from a starting point to a problem, the smoothest first.
        solver: One method for all.
        start: Starting point of the first stage.
        callback: As in :func:`iterate`; a stop ends the whole sequence.
        stage_rtol: Relative residual that ends a stage, dimensionless.
        last_rtol: The same for the last stage.
        max_iterations: Limit per stage.

    Returns:
        One result per stage that was run.

    Source:
        Continuation of spec bound_tightening 6.3.
    """
    results: list[Result] = []
    for number, stage in enumerate(stages):
        problem = stage(results[-1].value if results else start)
        is_last = number == len(stages) - 1
        result = iterate(
            problem,
            solver,
            atol=0.0,
            rtol=last_rtol if is_last else stage_rtol,
            max_iterations=max_iterations,
            callback=callback,
        )
        results.append(result)
        if result.status is Status.STOPPED:
            break
    return tuple(results)


_LOOP_SETTINGS = frozenset(
    ("start", "atol", "rtol", "max_iterations", "max_calls", "callback", "throw")
)


class _Run:
    """Bookkeeping of one run: best point, trace, the exit test."""

    def __init__(self, oracle: Oracle, state: State, tolerance: float) -> None:
        self.oracle = oracle
        self.tolerance = tolerance
        self.best = state
        self.iterations = -1
        self.trace: list[TracePoint] = []
        self.retry_below = float("inf")
        self.checked: tuple[State, float] | None = None
        self.observe(state)

    def observe(self, state: State) -> None:
        """Record one state."""
        self.iterations += 1
        self.trace.append(TracePoint(self.oracle.calls, state.residual, state.lipschitz))
        if state.residual < self.best.residual:
            self.best = state

    def verdict(
        self,
        state: State,
        max_iterations: int,
        max_calls: int | None,
        callback: Callback | None,
    ) -> Status | None:
        """Return why to stop, or None to continue."""
        if callback is not None and callback(state, self.oracle):
            return Status.STOPPED
        if state.residual <= self.tolerance and state.residual < self.retry_below:
            if self.certify(state) <= self.tolerance:
                return Status.CONVERGED
            # A claim that failed is not tested again before it has halved.
            self.retry_below = state.residual / 2
        if state.failure is not None:
            return state.failure
        if self.iterations >= max_iterations:
            return Status.MAX_ITERATIONS
        if max_calls is not None and self.oracle.calls >= max_calls:
            return Status.MAX_CALLS
        if self.tolerance > 0 and state.residual <= _floor(state):
            return Status.STALLED
        return None

    def certify(self, state: State) -> float:
        """Return the residual at the state's point from a full evaluation."""
        if self.checked is not None and self.checked[0] is state:
            return self.checked[1]
        residual = state.residual
        if not state.exact:
            value = self.oracle.full(state.point)
            residual = norm(value if state.normal is None else value + state.normal)
        if residual <= self.tolerance:
            self.best = state
        self.checked = (state, residual)
        return residual

    def result(self, status: Status, state: State, method: str, seconds: float) -> Result:
        """Assemble the result at the best point."""
        return Result(
            value=self.oracle.structure.unpack(self.best.point),
            residual=self.certify(self.best),
            status=status,
            method=method,
            iterations=self.iterations,
            restarts=state.restarts,
            oracle_calls=self.oracle.calls,
            seconds=seconds,
            lipschitz=state.lipschitz,
            trace=tuple(self.trace),
        )


def _floor(state: State) -> float:
    """Return the residual below which rounding of the point's dtype hides all progress."""
    unit = torch.finfo(state.point.dtype).eps
    return _FLOOR_UNITS * unit * state.lipschitz * norm(state.point)
