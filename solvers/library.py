"""Standard problems with known solutions, for tests, benchmarks and the command ``solve``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from common.config import one_of
from common.errors import ConfigError
from solvers.problem import Inclusion, fixed_point


class KnownProblem(NamedTuple):
    """A problem, one of its solutions, and an error measure that is zero at every solution."""

    problem: Inclusion
    solution: Tensor
    error: Callable[[Tensor], float]


def standard_problem(name: str, *, size: int = 50, seed: int = 0) -> KnownProblem:
    """Return a standard problem by name.

    Args:
        name: A key of ``PROBLEMS``.
        size: Number of unknowns (half of it per player in the games), at least 2.
        seed: Of the random data, drawn on the CPU in float64.

    Raises:
        ConfigError: for an unknown name or an impossible size.
    """
    one_of("problem", name, sorted(PROBLEMS))
    if size < 2:
        raise ConfigError(f"size={size}: expected at least 2 unknowns")
    return PROBLEMS[name](size, torch.Generator().manual_seed(seed))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _least_squares(size: int, generator: torch.Generator) -> KnownProblem:
    """Overdetermined least squares; solution by a QR solver, error is the distance to it."""
    a, b = _normal(generator, 2 * size, size), _normal(generator, 2 * size)
    solution = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    problem = Inclusion(
        operator=lambda x: a.T @ (a @ x - b),
        start=torch.zeros(size, dtype=torch.float64),
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)) ** 2,
        cocoercive=True,
    )
    return KnownProblem(problem, solution, lambda x: float((x - solution).norm()))


def _box_least_squares(size: int, generator: torch.Generator) -> KnownProblem:
    """Least squares over the unit box, with a planted solution and planted multipliers."""
    a = _normal(generator, 2 * size, size)
    hessian = a.T @ a
    solution = torch.rand(size, generator=generator, dtype=torch.float64)
    third = size // 3
    solution[:third], solution[third : 2 * third] = 0.0, 1.0
    push = torch.zeros_like(solution)
    push[:third], push[third : 2 * third] = 1.0, -1.0
    offset = push - hessian @ solution
    problem = Inclusion(
        operator=lambda x: hessian @ x + offset,
        start=torch.full((size,), 0.5, dtype=torch.float64),
        resolvent=lambda x, step: x.clamp(0.0, 1.0),
        lipschitz_bound=float(torch.linalg.eigvalsh(hessian)[-1]),
        cocoercive=True,
    )
    return KnownProblem(problem, solution, lambda x: float((x - solution).norm()))


def _rotation(size: int, generator: torch.Generator) -> KnownProblem:
    """A random orthogonal map: nonexpansive, and Picard iteration never gets closer to 0."""
    size += size % 2
    skew = _normal(generator, size, size)
    turn = torch.linalg.matrix_exp(0.3 * (skew - skew.T))
    start = _normal(generator, size)
    problem = fixed_point(lambda x: turn @ x, start)
    return KnownProblem(problem, torch.zeros_like(start), lambda x: float((x - turn @ x).norm()))


def _saddle(size: int, generator: torch.Generator) -> KnownProblem:
    """``min_x max_y (x - x*)^T A (y - y*)`` without constraints: monotone, not cocoercive."""
    half = max(1, size // 2)
    a = _normal(generator, half, half) + 2 * torch.eye(half, dtype=torch.float64) * half**0.5
    solution = _normal(generator, 2 * half)

    def operator(z: Tensor) -> Tensor:
        x, y = (z - solution).split(half)
        return torch.cat((a @ y, -(a.T @ x)))

    problem = Inclusion(
        operator=operator,
        start=torch.zeros(2 * half, dtype=torch.float64),
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)),
        cocoercive=False,
    )
    return KnownProblem(problem, solution, lambda z: float((z - solution).norm()))


def _matrix_game(size: int, generator: torch.Generator) -> KnownProblem:
    """``min_x max_y x^T A y`` on simplices; rows and columns sum to 0, so uniform play is optimal.

    The error is the duality gap ``max_j (A^T x)_j - min_i (A y)_i``.
    """
    half = max(2, size // 2)
    a = _normal(generator, half, half)
    a = a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()

    def operator(z: Tensor) -> Tensor:
        x, y = z.split(half)
        return torch.cat((a @ y, -(a.T @ x)))

    def gap(z: Tensor) -> float:
        x, y = z.split(half)
        return float((a.T @ x).max() - (a @ y).min())

    first = torch.zeros(2 * half, dtype=torch.float64)
    first[0] = first[half] = 1.0
    problem = Inclusion(
        operator=operator,
        start=first,
        resolvent=lambda z, step: torch.cat([project_simplex(part) for part in z.split(half)]),
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)),
        cocoercive=False,
    )
    return KnownProblem(problem, torch.full_like(first, 1 / half), gap)


def project_simplex(point: Tensor) -> Tensor:
    """Return the nearest point of the probability simplex to a vector (size,)."""
    ordered = point.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    active = int((ordered * counts > excess).sum())
    return (point - excess[active - 1] / active).clamp_min(0)


PROBLEMS: dict[str, Callable[[int, torch.Generator], KnownProblem]] = {
    "least_squares": _least_squares,
    "box_least_squares": _box_least_squares,
    "rotation": _rotation,
    "saddle": _saddle,
    "matrix_game": _matrix_game,
}
