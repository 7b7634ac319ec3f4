"""Linear programs ``min c^T x``, ``A_eq x = b_eq``, ``A_ub x <= b_ub``, ``low <= x <= high``.

In saddle form the multipliers y of ``A x - b`` are free for equations and nonnegative for
inequalities; prices have the opposite sign. Source: spec halpern_solvers 2.8.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from common.config import positive
from common.errors import ConfigError, ShapeError
from solvers.infeasibility import Verdict
from solvers.iterate import solve
from solvers.oracle import Oracle
from solvers.resolvents import Box
from solvers.saddle import BilinearSaddle, bilinear_saddle
from solvers.solution import Result, State
from solvers.structure import inner, norm

Rows = tuple[Tensor, Tensor]


def linear_program(
    cost_N: Tensor,
    *,
    equal: Rows | None = None,
    at_most: Rows | None = None,
    low: float | Tensor = 0.0,
    high: float | Tensor = math.inf,
) -> BilinearSaddle:
    """Return a linear program as a saddle point problem.

    Args:
        cost_N: c, floating.
        equal: ``(A_eq, b_eq)`` of shapes (rows, N) and (rows,), the matrix dense or sparse.
        at_most: ``(A_ub, b_ub)``, likewise.
        low: Lower bounds of x, a number or (N,).
        high: Upper bounds.

    Returns:
        A problem on ``(x, y)`` with the multipliers of the equations before the others.

    Raises:
        ConfigError: for data that are not finite, or crossed bounds.
        ShapeError: for rows that do not fit.
    """
    if cost_N.ndim != 1 or not cost_N.numel() or not cost_N.is_floating_point():
        raise ShapeError("cost: expected a floating vector with at least one entry")
    none = (cost_N.new_zeros(0, len(cost_N)), cost_N.new_zeros(0))
    (a_eq, b_eq), (a_ub, b_ub) = equal or none, at_most or none
    for name, matrix, vector in (("equal", a_eq, b_eq), ("at_most", a_ub, b_ub)):
        if matrix.shape != (len(vector), len(cost_N)):
            raise ShapeError(
                f"{name}: expected a matrix of shape ({len(vector)}, {len(cost_N)}), "
                f"got {tuple(matrix.shape)}; give one row per entry of the vector"
            )
    sign = torch.cat((torch.full_like(b_eq, -math.inf), torch.zeros_like(b_ub)))
    box = Box(low, high)
    # Dense and sparse matrices do not join, and one side is often empty.
    filled = [matrix for matrix in (a_eq, a_ub) if len(matrix)] or [a_eq]
    return bilinear_saddle(
        torch.cat(filled),
        cost=cost_N,
        offset=torch.cat((b_eq, b_ub)),
        primal=box,
        dual=Box(sign),
        start=(box(torch.zeros_like(cost_N), 1.0), torch.zeros_like(sign)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How far a primal-dual pair of a linear program is from optimal.

    Attributes:
        objective: ``c^T x``.
        dual_objective: Lower bound on the optimum where ``dual`` is 0.
        primal: Norm of the violated rows over ``1 + |b|``.
        dual: Norm of the reduced costs that no bound of x carries, over ``1 + |c|``.
        gap: ``|objective - dual_objective|`` over ``1 + |objective| + |dual_objective|``.
    """

    objective: float
    dual_objective: float
    primal: float
    dual: float
    gap: float

    @property
    def largest(self) -> float:
        """The largest of the three relative errors."""
        return max(self.primal, self.dual, self.gap)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearProgramResult:
    """Outcome of :func:`solve_linear_program`.

    Attributes:
        x: Primal point (N,), within its bounds.
        prices: (rows,) derivative of the optimum by the right-hand side, equations first.
        errors: Relative errors of the pair.
        status: ``optimal``, ``infeasible``, ``unbounded``, or ``open`` when the run ended before
            its tolerance; ``run.status`` then says why.
        run: What the solver says.
    """

    x: Tensor
    prices: Tensor
    errors: Errors
    status: Literal["optimal", "infeasible", "unbounded", "open"]
    run: Result

    @property
    def message(self) -> str:
        """One sentence with the status and the figures behind it."""
        errors = self.errors
        return (
            f"{self.status}: objective {errors.objective:.6g}, relative errors "
            f"{errors.primal:.1e} primal, {errors.dual:.1e} dual, {errors.gap:.1e} gap after "
            f"{self.run.iterations} iterations of {self.run.method}"
        )


def relative_errors(problem: BilinearSaddle, x: Tensor, y: Tensor) -> Errors:
    """Return the errors of a pair, from the data of the problem and in float64.

    Args:
        problem: From :func:`linear_program`.
        x: Point within its bounds.
        y: Multipliers of the right signs; prices are ``-y``.

    Raises:
        ConfigError: for a saddle point problem that is no linear program.
    """
    primal, dual = problem.primal, problem.dual
    if not isinstance(primal, Box) or not isinstance(dual, Box):
        raise ConfigError("linear program: expected boxes on both sides; use linear_program")
    reduced, slack = problem.gradient_x(y).double(), problem.gradient_y(x).double()
    low, high = primal.ends(reduced)
    # A reduced cost above 0 pushes x to its lower end, and costs nothing more where there is one.
    missing = ((reduced > 0) & torch.isinf(low)) | ((reduced < 0) & torch.isinf(high))
    below, _ = dual.ends(slack)
    # Rows with nonnegative multipliers may have slack b - A x > 0; equations may have none.
    violated = torch.where(torch.isinf(below), slack, slack.clamp_max(0))
    objective = inner(problem.cost, x)
    dual_objective = -inner(problem.offset, y) - primal.conjugate(
        torch.where(missing, 0.0, -reduced)
    )
    return Errors(
        objective=objective,
        dual_objective=dual_objective,
        primal=norm(violated) / (1 + norm(problem.offset)),
        dual=norm(torch.where(missing, reduced, 0.0)) / (1 + norm(problem.cost)),
        gap=abs(objective - dual_objective) / (1 + abs(objective) + abs(dual_objective)),
    )


class _Watch:
    """Callback that ends a run at the relative tolerance and keeps what it saw last."""

    def __init__(self, problem: BilinearSaddle, rtol: float, every: int) -> None:
        self.problem, self.rtol, self.every = problem, rtol, every
        self.calls = 0
        self.best: tuple[Errors, Tensor, Tensor] | None = None
        self.verdict: Verdict | None = None

    def __call__(self, state: State, oracle: Oracle) -> bool:
        """Test every few iterations; the products of the test count as an evaluation."""
        self.verdict = getattr(state, "verdict", None)
        self.calls += 1
        if (self.calls - 1) % self.every:
            return False
        oracle.full_evals += 1
        self.observe(*oracle.structure.unpack(state.point))
        assert self.best is not None
        return self.best[0].largest <= self.rtol

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Keep a pair that is better than the ones before."""
        errors = relative_errors(self.problem, x, y)
        if self.best is None or not errors.largest >= self.best[0].largest:
            self.best = errors, x, y


def solve_linear_program(
    problem: BilinearSaddle,
    *,
    rtol: float = 1e-8,
    method: str = "pdhg",
    test_every: int = 50,
    **settings: Any,
) -> LinearProgramResult:
    """Solve a linear program until its three relative errors are at most ``rtol``.

    Args:
        problem: From :func:`linear_program`.
        rtol: Tolerance of primal error, dual error and gap, at least 0.
        method: A key of ``solvers.SOLVERS``; only ``pdhg`` proves that there is no solution.
        test_every: Iterations between two tests of the errors.
        **settings: As in :func:`solvers.solve`, ``callback`` and tolerances excepted.

    Raises:
        ConfigError: for a problem that is no linear program, or impossible settings.
    """
    positive("rtol", rtol, zero=True)
    positive("test_every", test_every)
    watch = _Watch(problem, rtol, test_every)
    run = solve(problem, method, atol=0.0, callback=watch, **settings)
    watch.observe(*run.value)
    assert watch.best is not None
    errors, x, y = watch.best
    status: Literal["optimal", "infeasible", "unbounded", "open"] = watch.verdict or "open"
    if errors.largest <= rtol:
        status = "optimal"
    return LinearProgramResult(x=x, prices=-y, errors=errors, status=status, run=run)
