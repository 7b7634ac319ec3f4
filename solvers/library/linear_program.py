"""Linear programs in saddle form, with a planted optimum.

Source: spec halpern_solvers 2.8, 7.1.
"""

import torch
from torch import Tensor

from solvers.library.known import KnownProblem, normal, problem, uniform
from solvers.linear_program import linear_program as to_saddle
from solvers.saddle import Point


@problem("linear_program", size=60, smallest=6)
def linear_program(size: int, generator: torch.Generator) -> KnownProblem:
    """A random linear program with a planted, strictly complementary optimum.

    ``min c^T x`` with ``A x = b`` and ``x >= 0``; two thirds of the unknowns are x, the rest the
    multipliers y of the equations.
    """
    rows = max(1, size // 3)
    columns = size - rows
    a = normal(generator, rows, columns) / columns**0.5
    basis = torch.zeros(columns, dtype=torch.bool)
    basis[torch.randperm(columns, generator=generator)[:rows]] = True
    x = torch.where(basis, 0.5 + uniform(generator, columns), 0.0)
    slack = torch.where(basis, 0.0, 0.5 + uniform(generator, columns))
    y = normal(generator, rows)
    b, c = a @ x, slack - a.T @ y
    saddle = to_saddle(c, equal=(a, b))
    return KnownProblem(
        problem=saddle,
        sampled=saddle.finite_sum(),
        kind="bilinear",
        solution=(x, y),
        error=lambda z: _error(z, (x, y), a, b, c),
        allows=lambda z, residual: residual,
    )


def _error(point: Point, solution: Point, a: Tensor, b: Tensor, c: Tensor) -> float:
    """Return the largest of both infeasibilities and the relative error of the optimal value.

    Each is at most the residual: an element r of F + G at (x, y) has ``r_y = b - A x`` and
    ``r_x <= c + A^T y``, and ``|c^T x - c^T x*| <= (|z| + |z*|) |r|``.
    """
    x, y = point
    size = sum(float(torch.cat(pair).norm()) for pair in (point, solution))
    primal = float((a @ x - b).norm())
    dual = float((-c - a.T @ y).clamp_min(0).norm())
    return max(primal, dual, abs(float(c @ (x - solution[0]))) / size)
