"""Changes of variables that shrink the constants of saddle point problems.

Affine-hull centring removes the part of a coupling that no feasible difference can see; diagonal
preconditioning equilibrates rows and columns. Source: spec halpern_solvers 2.8 and 2.10.
Letters: M rows (dual), N columns (primal).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from solvers.resolvents import Step
from solvers.saddle import BilinearSaddle, bilinear_saddle, coupling_norm
from solvers.structure import inner

_RUIZ_PASSES = 10


class Metric(NamedTuple):
    """Step lengths ``tau = eta column^2 / omega`` and ``sigma = eta omega row^2``.

    Attributes:
        row: Positive factors of the dual variables (M,); 1 without preconditioning.
        column: Positive factors of the primal variables (N,).
        coupling: Spectral norm of ``diag(row) A diag(column)``.
    """

    row: Step
    column: Step
    coupling: float

    def steps(self, scale: float, weight: float) -> tuple[Step, Step]:
        """Return ``tau`` and ``sigma`` for ``eta = scale / coupling`` and ``omega = weight``."""
        eta = scale / self.coupling
        return eta / weight * self.column**2, eta * weight * self.row**2


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
    if problem.matrix is not None and problem.is_dense:
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


def precondition(matrix_MN: Tensor) -> Metric:
    """Return Ruiz factors followed by Pock-Chambolle factors.

    Args:
        matrix_MN: A, dense or sparse; rows and columns of zeros keep the factor 1.

    Source:
        Spec halpern_solvers 2.8: ten passes that divide by the roots of the largest entries, then
        one by the roots of the sums (alpha = 1), after which the spectral norm is at most 1.
    """
    # Shape letter: E stored entries.
    entries = matrix_MN.to_sparse_coo().coalesce()
    (row_E, column_E), size_E = entries.indices(), entries.values().abs()
    row_M, column_N = (matrix_MN.new_ones(size, layout=torch.strided) for size in matrix_MN.shape)
    for kind in ("amax",) * _RUIZ_PASSES + ("sum",):
        now_E = row_M[row_E] * size_E * column_N[column_E]
        row_M, column_N = (
            factors / _roots(torch.zeros_like(factors).scatter_reduce(0, index_E, now_E, kind))
            for factors, index_E in ((row_M, row_E), (column_N, column_E))
        )
    scaled_E = row_M[row_E] * entries.values() * column_N[column_E]
    scaled_MN = torch.sparse_coo_tensor(
        entries.indices(), scaled_E, entries.shape, is_coalesced=True, check_invariants=False
    )
    if matrix_MN.layout is torch.strided:
        scaled_MN = scaled_MN.to_dense()
    coupling, _ = coupling_norm(scaled_MN.__matmul__, scaled_MN.T.__matmul__, column_N, scaled_MN)
    return Metric(row_M, column_N, coupling or 1.0)


def _roots(sizes: Tensor) -> Tensor:
    """Return the square roots, 1 for zeros."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes)).sqrt()
