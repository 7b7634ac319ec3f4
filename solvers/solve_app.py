"""Command ``solve``: run one method on one standard problem and report how far it came."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from common.config import build, check_types, one_of, positive
from common.errors import ConfigError
from common.runs import Outcome, Run
from common.tracking import record
from solvers.iterate import SOLVERS, make_solver
from solvers.iterate import solve as solve_problem
from solvers.library import PROBLEMS, KnownProblem, standard_problem
from solvers.oracle import Oracle
from solvers.selector import choose
from solvers.solution import Result
from solvers.trace import residual_trace, write_trace

log = logging.getLogger(__name__)

AUTO = "auto"
_FIRST_NEWS_S = 2.0  # a run that is over earlier says nothing on the way


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SolveSettings:
    """What the configuration group ``solve`` says.

    Attributes:
        problem: A key of ``solvers.library.PROBLEMS``.
        method: ``auto`` or a key of ``solvers.SOLVERS``.
        size: Number of unknowns; None for the problem's own.
        atol: Absolute tolerance of the residual.
        rtol: Tolerance relative to the first residual.
        max_iterations: Limit of steps.
        max_calls: Limit of oracle calls in components; None for none.
        time_limit: Limit in seconds; None for none.
        options: Settings of the method, such as ``{restart_factor: 0.3}``.
        problem_options: Settings of the problem, such as ``{components: 1024}``.
    """

    problem: str = "least_squares"
    method: str = AUTO
    size: int | None = None
    atol: float = 1e-6
    rtol: float = 0.0
    max_iterations: int = 100_000
    max_calls: int | None = None
    time_limit: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem_options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate every field, the method's own options included."""
        check_types(self)
        one_of("problem", self.problem, sorted(PROBLEMS))
        one_of("method", self.method, [AUTO, *sorted(SOLVERS)])
        for name in ("atol", "rtol", "max_iterations"):
            positive(f"solve.{name}", getattr(self, name), zero=True)
        for name in ("size", "max_calls", "time_limit"):
            if (value := getattr(self, name)) is not None:
                positive(f"solve.{name}", value)
        if self.method != AUTO:
            make_solver(self.method, **self.options)
        elif self.options:
            raise ConfigError(
                f"solve.options={self.options}: method=auto takes none; name the method as well"
            )


def samples(method: str) -> bool:
    """Return whether a method draws components at random, as its setting ``seed`` tells."""
    return "seed" in {field.name for field in dataclasses.fields(SOLVERS[method])}


def solve(cfg: Any, run: Run) -> Outcome:
    """Solve a standard problem; reads ``problem``, ``method``, ``solve``, ``seed``, ``logger``.

    A run that stops before its tolerance is a result, not an error: the status is logged and the
    residual says how far it came.

    Raises:
        ConfigError: for a method that the problem's structure rules out.
    """
    settings: SolveSettings = build(cfg.solve)
    seed = int(cfg.seed)
    known = standard_problem(
        settings.problem, size=settings.size, seed=seed, **settings.problem_options
    )
    # One evaluation of the matrix form reads all components of the sum.
    components = known.num_components
    method = choose(known.problem).method if settings.method == AUTO else settings.method
    if samples(method):
        known = known.as_sum()
    scale = components // known.problem.num_components
    options = ({"seed": seed} if samples(method) else {}) | settings.options
    result = _run(known, settings, options, scale)
    log.info("%s: %s", settings.problem, result.message)
    trace = residual_trace(result, scale)
    artifacts = write_trace(run.directory, trace, f"{settings.problem}: {result.method}")
    record(build(cfg.logger), run, {row.iteration: row.metrics() for row in trace})
    return Outcome(
        metrics=_figures(known, result, scale),
        artifacts=artifacts,
        objective=float(scale * result.oracle_calls) if result.converged else float("inf"),
        notes={
            "method": result.method,
            "outcome": result.status.name.lower().replace("_", " "),
            "status": result.message,
            "problem": PROBLEMS[settings.problem].about,
        },
    )


def _run(
    known: KnownProblem, settings: SolveSettings, options: dict[str, Any], scale: int
) -> Result:
    return solve_problem(
        known.problem,
        settings.method,
        atol=settings.atol,
        rtol=settings.rtol,
        max_iterations=settings.max_iterations,
        max_calls=None if settings.max_calls is None else max(1, settings.max_calls // scale),
        time_limit=settings.time_limit,
        callback=_progress(time.perf_counter()),
        **options,
    )


def _progress(began: float) -> Callable[[Any, Oracle], None]:
    """Return a callback that logs at moments of doubling distance."""
    due, steps, best = _FIRST_NEWS_S, 0, float("inf")

    def news(state: Any, oracle: Oracle) -> None:
        nonlocal due, steps, best
        steps, best = steps + 1, min(best, state.residual)
        passed = time.perf_counter() - began
        if passed >= due:
            due = 2 * passed
            epochs = oracle.calls / oracle.num_components
            log.info(
                "%.0f s: iteration %d, %.4g evaluations, residual %.2e, best %.2e, restarts %d",
                *(passed, steps, epochs, state.residual, best, state.restarts),
            )

    return news


def _figures(known: KnownProblem, result: Result, scale: int) -> dict[str, float]:
    return {
        "solve/residual": result.residual,
        "solve/error": known.error(result.value),
        "solve/error_allowed": known.allows(result.value, result.residual),
        "solve/iterations": float(result.iterations),
        "solve/evals": float(scale * result.oracle_calls),
        "solve/full_evals": float(result.full_evals),
        "solve/component_evals": float(result.component_evals),
        "solve/seconds": result.seconds,
    }
