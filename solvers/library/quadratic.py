"""The paper's quadratic programme: monotone, neither bilinear nor cocoercive.

Source: spec halpern_solvers 3.2 (the authors' public script).
"""

import torch
from torch import Tensor

from solvers.finite_sum import FiniteSumInclusion
from solvers.library.known import KnownProblem, distance_to, problem, spectral

# Shape letters: N unknowns per player (also components), D = 2 N unknowns, M drawn components.


@problem("quadratic", size=400, smallest=4)
def quadratic(size: int, generator: torch.Generator) -> KnownProblem:
    """The paper's quadratic programme ``F(x, y) = (H x - h - A^T y, A x - b)``, H = 2 A^T A.

    ``A`` is a quarter of an anti-bidiagonal matrix; a component is one coordinate of x and of y.
    It has no random data. Its condition grows with the square of the size.
    """
    half = (size + 1) // 2
    a_NN = _anti_bidiagonal(half)
    h_NN = 2 * a_NN.T @ a_NN
    offset = torch.cat((_last(half, -0.25), torch.full((half,), -0.25, dtype=torch.float64)))
    m_DD = torch.cat(
        (torch.cat((h_NN, -a_NN.T), 1), torch.cat((a_NN, torch.zeros_like(a_NN)), 1)), 0
    )
    columns_NDC = torch.stack((m_DD[:, :half].T, m_DD[:, half:].T), 2)

    def components(z: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
        pair_MC = torch.stack((z[index_M], z[half + index_M]), 1) * (half * weight_M)[:, None]
        moved = torch.einsum("mdc,mc->d", columns_NDC[index_M], pair_MC)
        return moved + weight_M.sum() * offset

    inclusion = FiniteSumInclusion(
        components=components,
        num_components=half,
        start=torch.full((2 * half,), 1 / half, dtype=torch.float64),
        lipschitz_bound=spectral(m_DD),
        component_lipschitz=half * torch.linalg.matrix_norm(columns_NDC, 2),
        cocoercive=False,
        mean=lambda z: m_DD @ z + offset,
    )
    solution = torch.linalg.solve(m_DD, -offset)
    smallest = float(torch.linalg.svdvals(m_DD)[-1])
    return KnownProblem(problem=inclusion, kind="monotone", **distance_to(solution, smallest))


def _anti_bidiagonal(half: int) -> Tensor:
    rows = torch.arange(half)
    a_NN = torch.zeros(half, half, dtype=torch.float64)
    a_NN[rows, half - 1 - rows] = 0.25
    a_NN[rows[:-1], half - 2 - rows[:-1]] = -0.25
    return a_NN


def _last(half: int, value: float) -> Tensor:
    vector = torch.zeros(half, dtype=torch.float64)
    vector[-1] = value
    return vector
