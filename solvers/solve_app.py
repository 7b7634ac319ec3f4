"""Command ``solve``: run one method on one standard problem and report how far it came."""

import dataclasses
import logging
from typing import Any

from common.config import build, check_types, one_of, positive
from common.errors import ConfigError
from common.runs import Outcome, Run
from common.tracking import record
from solvers.iterate import SOLVERS, make_solver
from solvers.iterate import solve as solve_problem
from solvers.library import PROBLEMS, standard_problem
from solvers.solution import Result

log = logging.getLogger(__name__)

_MAX_ROWS = 500  # rows of the trace that are logged


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SolveSettings:
    """What the configuration group ``solve`` says.

    Attributes:
        problem: A key of ``solvers.library.PROBLEMS``.
        method: A key of ``solvers.SOLVERS``.
        size: Number of unknowns.
        atol: Absolute tolerance of the residual.
        rtol: Tolerance relative to the first residual.
        max_iterations: Limit of steps.
        max_calls: Limit of operator evaluations; null for none.
        options: Settings of the method, such as ``{restart_factor: 0.3}``.
    """

    problem: str = "least_squares"
    method: str = "halpern_restarted"
    size: int = 50
    atol: float = 1e-6
    rtol: float = 0.0
    max_iterations: int = 20_000
    max_calls: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate every field, the method's own options included."""
        check_types(self)
        one_of("solve.problem", self.problem, sorted(PROBLEMS))
        one_of("solve.method", self.method, sorted(SOLVERS))
        if self.size < 2:
            raise ConfigError(f"solve.size={self.size}: expected at least 2 unknowns")
        for name in ("atol", "rtol", "max_iterations"):
            positive(f"solve.{name}", getattr(self, name), zero=True)
        if self.max_calls is not None:
            positive("solve.max_calls", self.max_calls)
        make_solver(self.method, **self.options)


def solve(cfg: Any, run: Run) -> Outcome:
    """Solve a standard problem; reads ``solve``, ``seed`` and ``logger``.

    A run that stops before its tolerance is a result, not an error: the status is logged and the
    residual says how far it came.

    Raises:
        ConfigError: for a method that the problem's structure rules out.
    """
    settings: SolveSettings = build(cfg.solve)
    known = standard_problem(settings.problem, size=settings.size, seed=int(cfg.seed))
    result = solve_problem(
        known.problem,
        settings.method,
        atol=settings.atol,
        rtol=settings.rtol,
        max_iterations=settings.max_iterations,
        max_calls=settings.max_calls,
        **settings.options,
    )
    log.info("%s: %s", settings.problem, result.message)
    record(build(cfg.logger), run, _rows(result))
    return Outcome(
        metrics={
            "solve/residual": result.residual,
            "solve/error": known.error(result.value),
            "solve/iterations": float(result.iterations),
            "solve/evals": float(result.oracle_calls),
            "solve/seconds": result.seconds,
        },
        artifacts={},
        objective=float(result.oracle_calls) if result.converged else float("inf"),
    )


def _rows(result: Result) -> dict[int, dict[str, float]]:
    stride = max(1, len(result.trace) // _MAX_ROWS)
    return {
        step: {"solve/residual": point.residual, "solve/evals": float(point.calls)}
        for step, point in enumerate(result.trace)
        if step % stride == 0
    }
