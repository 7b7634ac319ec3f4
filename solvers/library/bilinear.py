"""Unconstrained bilinear saddle points, alone and as a finite sum.

Skew operators: monotone, Lipschitz, never cocoercive. Source: spec halpern_solvers 4.3, 3.2.
"""

import torch
from torch import Tensor

from solvers.finite_sum import FiniteSumInclusion
from solvers.library.known import KnownProblem, distance_to, normal, problem, spectral, zeros
from solvers.problem import Inclusion

# Shape letters: N components, D unknowns, M drawn components.

_LIPSCHITZ_MEAN_SQUARE = 1.013  # L_Q of the sum, where L_F = 1
_DISTANCE = 5.0  # from the start to the solution


@problem("saddle", size=50)
def saddle(size: int, generator: torch.Generator) -> KnownProblem:
    """``min_x max_y (x - x*)^T A (y - y*)`` without constraints: monotone, not cocoercive."""
    half = max(1, size // 2)
    a = normal(generator, half, half) + 2 * torch.eye(half, dtype=torch.float64) * half**0.5
    solution = normal(generator, 2 * half)
    sizes = torch.linalg.svdvals(a)

    def operator(z: Tensor) -> Tensor:
        x, y = (z - solution).split(half)
        return torch.cat((a @ y, -(a.T @ x)))

    inclusion = Inclusion(
        operator=operator,
        start=zeros(2 * half),
        lipschitz_bound=float(sizes[0]),
        cocoercive=False,
    )
    return bilinear(inclusion, solution, float(sizes[-1]))


@problem("bilinear_sum", size=24, smallest=4)
def bilinear_sum(size: int, generator: torch.Generator, *, components: int = 64) -> KnownProblem:
    """``F_i(z) = (S + R_i) z + c``: the clean test of variance reduction, L_F = 1, L_Q = 1.013.

    ``S`` is skew from a bidiagonal matrix (smallest singular value 0.063 at 24 unknowns), the
    ``R_i`` are random skew matrices that cancel, and the solution is 5 away from the start.

    Args:
        size: Unknowns; rounded up to an even number.
        generator: Of the ``R_i`` and the solution.
        components: Number of components, at least 2.
    """
    half = (size + 1) // 2
    components = max(2, components)
    s_DD = _skew_bidiagonal(half)
    r_NDD = normal(generator, components, 2 * half, 2 * half)
    r_NDD = r_NDD - r_NDD.mT
    r_NDD = r_NDD - r_NDD.mean(0)
    r_NDD = r_NDD * _noise_scale(s_DD, (r_NDD.mT @ r_NDD).mean(0))
    solution = normal(generator, 2 * half)
    solution = solution * (_DISTANCE / solution.norm())
    offset = -(s_DD @ solution)
    m_NDD = s_DD + r_NDD

    def components_of(z: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
        return weight_M @ (m_NDD[index_M] @ z) + weight_M.sum() * offset

    inclusion = FiniteSumInclusion(
        components=components_of,
        num_components=components,
        start=zeros(2 * half),
        lipschitz_bound=1.0,
        mean_square_lipschitz=_LIPSCHITZ_MEAN_SQUARE,
        cocoercive=False,
        mean=lambda z: s_DD @ z + offset,
    )
    return bilinear(inclusion, solution, float(torch.linalg.svdvals(s_DD)[-1]))


def bilinear(
    inclusion: Inclusion | FiniteSumInclusion, solution: Tensor, smallest: float
) -> KnownProblem:
    """Return the known problem of an invertible linear part with this smallest singular value."""
    # |F(z)| = |M (z - z*)| >= sigma_min |z - z*|.
    return KnownProblem(problem=inclusion, kind="bilinear", **distance_to(solution, smallest))


def _skew_bidiagonal(half: int) -> Tensor:
    """Return the skew matrix of the hard bidiagonal coupling, scaled to norm 1."""
    b = torch.eye(half, dtype=torch.float64) - torch.diag(torch.ones(half - 1).double(), 1)
    b = b / spectral(b)
    s_DD = b.new_zeros(2 * half, 2 * half)
    s_DD[:half, half:], s_DD[half:, :half] = b, -b.T
    return s_DD


def _noise_scale(s_DD: Tensor, square_DD: Tensor) -> float:
    """Return t with ``lambda_max(S^T S + t^2 mean R^T R) = L_Q^2``, by bisection."""
    low, high = 0.0, 1.0
    while _mean_square(s_DD, square_DD, high) < _LIPSCHITZ_MEAN_SQUARE:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if _mean_square(s_DD, square_DD, middle) < _LIPSCHITZ_MEAN_SQUARE:
            low = middle
        else:
            high = middle
    return low


def _mean_square(s_DD: Tensor, square_DD: Tensor, scale: float) -> float:
    return float(torch.linalg.eigvalsh(s_DD.T @ s_DD + scale**2 * square_DD)[-1]) ** 0.5
