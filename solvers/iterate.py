"""The one loop that drives every method, the registry of methods, and continuation.

A method is an immutable object with ``init`` and ``step``; the loop decides when to stop and
recomputes the residual before it says that a method has converged.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from common.config import one_of
from common.errors import ConfigError
from solvers.exits import Limits
from solvers.inspection import check_repeatable, check_resolvent
from solvers.oracle import Oracle
from solvers.problem import Problem
from solvers.run import Callback as Callback
from solvers.run import Run
from solvers.run import Solver as Solver
from solvers.selector import choose
from solvers.solution import Result, Status
from solvers.solution import State as State
from solvers.structure import Value, check_start

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
    known = sorted(each.name for each in fields(SOLVERS[method]))
    for name, value in options.items():
        if name not in known:
            names = ", ".join(known) or "no settings"
            raise ConfigError(f"{name}={value}: method={method} does not know it; it has {names}")
    return SOLVERS[method](**options)


@torch.no_grad()
def iterate(
    problem: Problem,
    solver: Solver,
    *,
    start: Value | None = None,
    warm_start: Result | None = None,
    callback: Callback | None = None,
    throw: bool = False,
    check: bool = True,
    debug: bool = False,
    **limits: Any,
) -> Result:
    """Run a method until the recomputed residual is within the tolerance of ``Limits``.

    Args:
        problem: The inclusion.
        solver: The method.
        start: Replaces ``problem.start``; it becomes the anchor.
        warm_start: An earlier result; its point becomes the anchor and its constants are kept,
            while counts (and with them the anchoring weights) begin again.
        callback: Called with (state, oracle) once per iteration; a true value or an interrupt
            from the keyboard stops.
        throw: Raise instead of returning a result that has not converged.
        check: Ask for one component twice before the first step, to refuse random operators.
        debug: Test the resolvent on random pairs first.
        **limits: Fields of :class:`solvers.exits.Limits`: ``atol``, ``rtol``, ``max_iterations``,
            ``max_calls``, ``time_limit``.

    Returns:
        The best point with its residual; never a residual that was not recomputed there.

    Raises:
        ConfigError: for impossible tolerances or limits, an operator that is not finite or not a
            function, or (with ``debug``) a resolvent that is none.
        ConvergenceError: only with ``throw``.
    """
    if start is not None and warm_start is not None:
        raise ConfigError("start and warm_start: expected one of them; remove the other")
    bounds = Limits(**limits)
    oracle = Oracle(problem, None if warm_start is None else warm_start.state)
    first = warm_start.value if warm_start is not None else start
    first = problem.start if first is None else first
    check_start(first)
    point = oracle.structure.pack(first, "start")
    if debug:
        check_resolvent(oracle, point)
    run = Run(oracle, solver, point, bounds, callback)
    while True:
        status = run.verdict()
        if status is None:
            if check and run.iterations == 0:
                check_repeatable(oracle, run.state.lipschitz)
            run.step()
        elif not run.recover(status):
            break
    result = run.result(status)
    return result.raise_for_status() if throw else result


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
            check=False,
        )
        results.append(result)
        if result.status is Status.STOPPED:
            break
    return tuple(results)


def solve(problem: Problem, method: str = "auto", **settings: Any) -> Result:
    """Solve an inclusion by a method of the registry.

    Args:
        problem: What to solve.
        method: A key of ``SOLVERS``, or ``auto`` for the default of the problem's class; the
            result then gives the reason in ``detail``.
        **settings: Arguments of :func:`iterate`; all others go to the method. ``auto`` takes none
            where it may have to change the method.

    Returns:
        The result; see :class:`solvers.solution.Result`.

    Raises:
        ConfigError: for an unknown method or option, or a problem that the method refuses.
        ConvergenceError: only with ``throw=True``.
    """
    of_loop = {key: settings.pop(key) for key in tuple(settings) if key in _LOOP_SETTINGS}
    if method != "auto":
        return iterate(problem, make_solver(method, **settings), **of_loop)
    choice = choose(problem)
    solver = make_solver(choice.method, **settings)
    if settings and choice.fallback is not None:
        raise ConfigError(
            f"{', '.join(settings)}: method=auto may change from {choice.method} to "
            f"{choice.fallback}, whose settings differ; name the method as well"
        )
    throw = of_loop.pop("throw", False)
    result = iterate(problem, solver, **of_loop)
    reason = f"{choice.method} was chosen because {choice.reason}."
    if result.status is Status.ASSUMPTION_VIOLATED and choice.fallback is not None:
        left = of_loop | _remaining(of_loop, result)
        result = _joined(result, iterate(problem, make_solver(choice.fallback), **left))
        reason = f"{choice.fallback} took over because {choice.method} found F not cocoercive."
    result = replace(result, detail=f"{result.detail} {reason}".lstrip())
    return result.raise_for_status() if throw else result


def _remaining(limits: dict[str, Any], spent: Result) -> dict[str, float]:
    """Return the budgets that a first run leaves to a second one, at least one step each."""
    costs = (
        ("max_iterations", spent.iterations, 1),
        ("max_calls", spent.oracle_calls, 1),
        ("time_limit", spent.seconds, 1e-3),
    )
    given = ((name, limits.get(name), cost, least) for name, cost, least in costs)
    return {name: max(least, limit - cost) for name, limit, cost, least in given if limit}


def _joined(first: Result, second: Result) -> Result:
    """Return the second result with the cost of both runs."""
    sums = ("iterations", "full_evals", "component_evals", "oracle_calls", "seconds")
    costs = {name: getattr(first, name) + getattr(second, name) for name in sums}
    shifted = tuple(p._replace(calls=p.calls + first.oracle_calls) for p in second.trace)
    return replace(second, trace=first.trace + shifted, **costs)


_LOOP_SETTINGS = frozenset(inspect.signature(iterate).parameters) - {"problem", "solver", "limits"}
_LOOP_SETTINGS |= {each.name for each in fields(Limits)}
