"""Changes of variables that shrink the constants of saddle point problems.

Affine-hull centring removes the part of a coupling that no feasible difference can see; diagonal
preconditioning equilibrates rows and columns. Source: spec halpern_solvers 2.8 and 2.10.
Letters: M rows (dual), N columns (primal).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solvers.saddle import BilinearSaddle, bilinear_saddle
from solvers.structure import inner

RUIZ_PASSES = 10


class Preconditioner(NamedTuple):
    """Positive factors that make ``diag(row) A diag(column)`` well scaled.

    Attributes:
        row_M: Factors of the dual variables.
        column_N: Factors of the primal variables.
    """

    row_M: Tensor
    column_N: Tensor


def center(problem: BilinearSaddle) -> BilinearSaddle:
    """Restrict the operator to the affine hull of the domain.

    With ``P`` the projections onto the spans of differences, A becomes ``P_y A P_x`` and the
    vectors absorb the rest. On the domain the saddle function is the same number, so solutions,
    projections, natural residual and duality gap are too; only the Lipschitz constant shrinks.

    Args:
        problem: The problem; resolvents without a proper tangent space leave it as it is.

    Returns:
        A problem of the same kind on the same points, with its own Lipschitz constant.
    """
    tangent_x, tangent_y = problem.primal.tangent_projection, problem.dual.tangent_projection
    x, y = problem.primal(problem.start[0], 1.0), problem.dual(problem.start[1], 1.0)
    fixed_x, fixed_y = x - tangent_x(x), y - tangent_y(y)
    coupling: Tensor | tuple
    if problem.matrix is not None:
        coupling = tangent_y(tangent_x(problem.matrix).T).T.contiguous()
    else:
        coupling = (
            lambda x: tangent_y(problem.forward(tangent_x(x))),
            lambda y: tangent_x(problem.adjoint(tangent_y(y))),
        )
    return bilinear_saddle(
        coupling,
        cost=tangent_x(problem.gradient_x(fixed_y)),
        offset=tangent_y(problem.gradient_y(fixed_x)),
        primal=problem.primal,
        dual=problem.dual,
        start=problem.start,
        constant=problem.constant
        + inner(problem.cost, fixed_x)
        - inner(fixed_y, problem.gradient_y(fixed_x)),
    )


def precondition(matrix_MN: Tensor, *, passes: int = RUIZ_PASSES) -> Preconditioner:
    """Return Ruiz factors followed by Pock-Chambolle factors.

    Args:
        matrix_MN: A; rows and columns of zeros keep the factor 1.
        passes: Ruiz passes, each of which divides by the roots of the largest entries.

    Source:
        Spec halpern_solvers 2.8; Pock-Chambolle with alpha = 1, by the roots of the sums.
    """
    rows, columns = matrix_MN.shape
    row_M, column_N = matrix_MN.new_ones(rows), matrix_MN.new_ones(columns)
    if not matrix_MN.numel():
        return Preconditioner(row_M, column_N)
    size_MN = matrix_MN.abs()
    for _ in range(passes):
        now_MN = row_M[:, None] * size_MN * column_N
        row_M = row_M / _root(now_MN.amax(1))
        column_N = column_N / _root(now_MN.amax(0))
    now_MN = row_M[:, None] * size_MN * column_N
    return Preconditioner(row_M / _root(now_MN.sum(1)), column_N / _root(now_MN.sum(0)))


def _root(sizes: Tensor) -> Tensor:
    """Return the square roots, 1 for zeros."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes)).sqrt()
