"""Bound tightening with one multiplier vector that many input cells share.

``min_theta (1/N) sum_s f_mu(theta; C_s, B_s, G)``: each component is the smoothed K-form of one
cell, smooth and convex, and costs one eigen-decomposition. Source: spec bound_tightening 6.4.
"""

import torch
from torch import Tensor

from solvers.bounds.kform import KForm
from solvers.bounds.mlp_block import mlp_objective
from solvers.finite_sum import FiniteSumInclusion
from solvers.iterate import solve
from solvers.library.known import KnownProblem, normal, problem, spectral, uniform

# Shape letters: D width of the block, N cells (components), U multipliers, M drawn cells.

_SMOOTHING = 0.02  # mu relative to the first value
_REFERENCE_TOL = 1e-9  # residual of the point that errors refer to, relative to the first


@problem("shared_multipliers", size=24, smallest=4)
def shared_multipliers(
    size: int, generator: torch.Generator, *, components: int = 20, width: int = 8
) -> KnownProblem:
    """One multiplier vector for the K-form bounds of a residual MLP block on many input cells.

    Args:
        size: Multipliers, one per neuron of the block.
        generator: Of the weights and of the slope interval of each neuron in each cell.
        components: Number of cells.
        width: Input and output width of the block.
    """
    cells = _cells(size, width, components, generator)
    start = cells[0].best_theta.clone()
    mu = _SMOOTHING * sum(cell.value(start) for cell in cells) / len(cells)

    def gradient(theta_U: Tensor, index_M: Tensor, weight_M: Tensor) -> Tensor:
        total_U = torch.zeros_like(theta_U)
        for index, weight in zip(index_M.tolist(), weight_M.tolist(), strict=True):
            total_U += weight * cells[index].gradient(theta_U, mu)
        return total_U

    inclusion = FiniteSumInclusion(
        components=gradient,
        num_components=len(cells),
        start=start,
        lipschitz_est=sum(_curvature(cell, start, mu) for cell in cells) / len(cells),
        component_lipschitz=torch.tensor([_curvature(cell, start, mu) for cell in cells]).double(),
        cocoercive=True,
    )
    every = torch.arange(len(cells))
    first = float(gradient(start, every, torch.full((len(cells),), 1 / len(cells))).norm())
    reference = solve(inclusion, "lbfgs", atol=_REFERENCE_TOL * first, max_iterations=500)
    least = _objective(cells, reference.value, mu)

    def distance(theta_U: Tensor) -> float:
        return float((theta_U - reference.value).norm())

    return KnownProblem(
        problem=inclusion,
        kind="cocoercive",
        solution=reference.value,
        error=lambda theta_U: max(0.0, _objective(cells, theta_U, mu) - least),
        # f(v) - f* <= |f'(v)| |v - u*| for convex f.
        allows=lambda theta_U, residual: (residual + reference.residual) * distance(theta_U),
    )


def _cells(size: int, width: int, count: int, generator: torch.Generator) -> list[KForm]:
    """Return the objectives of a block ``x + W2 act(W1 x)`` on cells with slopes in intervals."""
    inner = normal(generator, size, width)
    outer = normal(generator, width, size)
    inner, outer = inner / spectral(inner), outer / spectral(outer)
    cells = []
    for _ in range(count):
        middle_U = uniform(generator, size)
        half_U = 0.1 + 0.5 * uniform(generator, size)
        linear = torch.eye(width, dtype=torch.float64) + (outer * middle_U) @ inner
        cells.append(mlp_objective(linear, outer * half_U, inner))
    return cells


def _objective(cells: list[KForm], theta_U: Tensor, mu: float) -> float:
    """Return the mean smoothed bound, ``mu log(tr exp(K / mu) / dim)`` per cell."""
    total = 0.0
    for cell in cells:
        (term,) = cell.terms
        values = torch.linalg.eigvalsh(cell.matrix(term, theta_U))
        total += mu * float(torch.logsumexp(values / mu, 0))
    return total / len(cells)


def _curvature(cell: KForm, theta_U: Tensor, mu: float) -> float:
    """Return the estimate of the gradient's Lipschitz constant that ``KForm.problem`` uses."""
    p_U, q_U = cell.moments(theta_U, mu)
    return 4 * float((theta_U.exp() * p_U + (-theta_U).exp() * q_U).max())
