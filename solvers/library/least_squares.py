"""Least squares: dense, as a sum over rows, rank deficient, and over a box.

Source: spec halpern_solvers 4.2 and 7.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.finite_sum import FiniteSumInclusion
from solvers.library.known import (
    KnownProblem,
    distance_to,
    normal,
    problem,
    uniform,
    zeros,
)
from solvers.problem import Inclusion
from solvers.resolvents import Box

Components = Callable[[Tensor, Tensor, Tensor], Tensor]

# Shape letters: N rows of the data (components), D unknowns, M drawn components.


@problem("least_squares", size=50)
def least_squares(size: int, generator: torch.Generator) -> KnownProblem:
    """Overdetermined least squares; the solution is that of a QR solver."""
    a_ND, b_N = normal(generator, 2 * size, size), normal(generator, 2 * size)
    sizes = torch.linalg.svdvals(a_ND)
    inclusion = Inclusion(
        operator=lambda x: a_ND.T @ (a_ND @ x - b_N),
        start=zeros(size),
        lipschitz_bound=float(sizes[0]) ** 2,
        cocoercive=True,
    )
    solution = torch.linalg.lstsq(a_ND, b_N[:, None]).solution[:, 0]
    return KnownProblem(
        problem=inclusion, kind="cocoercive", **distance_to(solution, float(sizes[-1]) ** 2)
    )


@problem("least_squares_sum", size=50)
def least_squares_sum(
    size: int, generator: torch.Generator, *, components: int = 256, decay: float = 1.0
) -> KnownProblem:
    """Least squares as a mean over rows, with a spectrum that decays as a power.

    Args:
        size: Unknowns.
        generator: Of the data.
        components: Rows, at least as many as unknowns for a unique solution.
        decay: The standard deviation of unknown j is ``j^-decay``.
    """
    components = max(components, 2 * size)
    a_ND = normal(generator, components, size)
    a_ND = a_ND * torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    a_ND = a_ND / a_ND.norm(dim=1).max()
    b_N = a_ND @ normal(generator, size) + 0.1 * normal(generator, components)
    sizes = torch.linalg.svdvals(a_ND)
    inclusion = FiniteSumInclusion(
        components=row_sum(a_ND, b_N),
        num_components=components,
        start=zeros(size),
        lipschitz_bound=float(sizes[0]) ** 2 / components,
        component_lipschitz=a_ND.square().sum(1),
        cocoercive=True,
        mean=row_mean(a_ND, b_N),
    )
    solution = torch.linalg.lstsq(a_ND, b_N[:, None]).solution[:, 0]
    modulus = float(sizes[-1]) ** 2 / components
    return KnownProblem(problem=inclusion, kind="cocoercive", **distance_to(solution, modulus))


@problem("min_norm_least_squares", size=50)
def min_norm_least_squares(size: int, generator: torch.Generator) -> KnownProblem:
    """Rank-deficient least squares; from 0 every method must find the pseudo-inverse's solution.

    No update from 0 leaves the row space, where the operator is strongly monotone.
    """
    rank = max(1, size // 2)
    a_ND = normal(generator, 2 * size, rank) @ normal(generator, rank, size) / size**0.5
    b_N = normal(generator, 2 * size)
    sizes = torch.linalg.svdvals(a_ND)[:rank]
    inclusion = Inclusion(
        operator=lambda x: a_ND.T @ (a_ND @ x - b_N),
        start=zeros(size),
        lipschitz_bound=float(sizes[0]) ** 2,
        cocoercive=True,
    )
    solution = torch.linalg.pinv(a_ND, rtol=1e-10) @ b_N
    return KnownProblem(
        problem=inclusion, kind="cocoercive", **distance_to(solution, float(sizes[-1]) ** 2)
    )


@problem("box_least_squares", size=50)
def box_least_squares(size: int, generator: torch.Generator) -> KnownProblem:
    """Least squares over the unit box, with a planted solution and planted multipliers."""
    a_ND = normal(generator, 2 * size, size)
    hessian_DD = a_ND.T @ a_ND
    solution = uniform(generator, size)
    third = size // 3
    solution[:third], solution[third : 2 * third] = 0.0, 1.0
    push = torch.zeros_like(solution)
    push[:third], push[third : 2 * third] = 1.0, -1.0
    offset = push - hessian_DD @ solution
    sizes = torch.linalg.eigvalsh(hessian_DD)
    inclusion = Inclusion(
        operator=lambda x: hessian_DD @ x + offset,
        start=torch.full((size,), 0.5, dtype=torch.float64),
        resolvent=Box(0.0, 1.0),
        lipschitz_bound=float(sizes[-1]),
        cocoercive=True,
    )
    return KnownProblem(
        problem=inclusion, kind="cocoercive", **distance_to(solution, float(sizes[0]))
    )


def row_sum(a_ND: Tensor, b_N: Tensor) -> Components:
    """Return the components ``a_i (a_i^T x - b_i)`` of a least-squares gradient."""

    def components(x: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
        rows_MD = a_ND[index_M]
        return rows_MD.T @ (weight_M * (rows_MD @ x - b_N[index_M]))

    return components


def row_mean(a_ND: Tensor, b_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the mean of the components of :func:`row_sum`."""
    return lambda x: a_ND.T @ (a_ND @ x - b_N) / len(b_N)
