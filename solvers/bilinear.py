"""Bilinear couplings as finite sums over the rows and columns of a matrix.

Letters: R rows, C columns, M samples. Source: spec halpern_solvers 1.3.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.config import one_of
from solvers.finite_sum import FiniteSumInclusion
from solvers.sampling import importance_law, uniform_law

_RARE = 1e-3  # probability of a row or column of zeros, relative to the mean


def bilinear_sum(
    matrix_RC: Tensor,
    *,
    sampling: str = "auto",
    start: Tensor | None = None,
    primal_C: Tensor | None = None,
    dual_R: Tensor | None = None,
    resolvent: Callable[[Tensor, float], Tensor] | None = None,
) -> FiniteSumInclusion:
    """Return ``min_x max_y y^T A x + c^T x - b^T y + g(x) - h(y)`` as a sum over rows and columns.

    One component call reads one row and one column of A, drawn independently.

    Args:
        matrix_RC: A, (rows, columns), floating.
        sampling: ``auto`` draws by squared norms (L_Q is the Frobenius norm), or ``uniform``.
        start: z = (x, y) packed, (C + R,); zeros when omitted.
        primal_C: c, zeros when omitted.
        dual_R: b, zeros when omitted.
        resolvent: Of (g, h) on the packed z.

    Returns:
        ``F(x, y) = (A^T y + c, b - A x)`` with max(R, C) components.

    Raises:
        ConfigError: for an unknown law.

    Source:
        Spec halpern_solvers 1.3, rows 3 and 4.
    """
    one_of("sampling", sampling, ("auto", "uniform"))
    num_rows, num_columns = matrix_RC.shape
    shift = torch.cat(
        (
            matrix_RC.new_zeros(num_columns) if primal_C is None else primal_C,
            matrix_RC.new_zeros(num_rows) if dual_R is None else dual_R,
        )
    )
    rows_R, columns_C = (_weights(matrix_RC.square().sum(axis)) for axis in (1, 0))
    components, mean = _operators(matrix_RC, shift)
    is_uniform = sampling == "uniform"
    largest = max(num_rows * float(rows_R.max()), num_columns * float(columns_C.max()))
    square = largest if is_uniform else max(float(rows_R.sum()), float(columns_C.sum()))
    return FiniteSumInclusion(
        components=components,
        num_components=max(num_rows, num_columns),
        start=torch.zeros_like(shift) if start is None else start,
        resolvent=resolvent,
        lipschitz_bound=float(torch.linalg.matrix_norm(matrix_RC, 2)),
        mean_square_lipschitz=math.sqrt(square),
        cocoercive=False,
        laws=(
            uniform_law(num_rows) if is_uniform else importance_law(rows_R),
            uniform_law(num_columns) if is_uniform else importance_law(columns_C),
        ),
        mean=mean,
    )


def _weights(squares: Tensor) -> Tensor:
    """Return squared norms to sample by; rows of zeros carry a part of b, so they get a little."""
    return torch.where(squares > 0, squares, _RARE * squares.mean())


def _operators(
    matrix_RC: Tensor, shift: Tensor
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the weighted components, from one row and one column each, and their mean."""
    num_rows, num_columns = matrix_RC.shape

    def components(z: Tensor, index_MB: Tensor, weight_MB: Tensor) -> Tensor:
        x, y = z.split((num_columns, num_rows))
        row, column = index_MB.unbind(-1)
        by_row, by_column = weight_MB.unbind(-1)
        primal = (by_row * num_rows * y[row]) @ matrix_RC[row]
        dual = matrix_RC[:, column] @ (by_column * num_columns * x[column])
        mass = torch.cat((by_row.sum().expand(num_columns), by_column.sum().expand(num_rows)))
        return torch.cat((primal, -dual)) + mass * shift

    def mean(z: Tensor) -> Tensor:
        x, y = z.split((num_columns, num_rows))
        return torch.cat((y @ matrix_RC, -(matrix_RC @ x))) + shift

    return components, mean
