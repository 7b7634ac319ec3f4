"""Fixed points of nonexpansive maps."""

import torch

from solvers.library.known import KnownProblem, normal, problem
from solvers.problem import fixed_point


@problem("rotation", size=50)
def rotation(size: int, generator: torch.Generator) -> KnownProblem:
    """A random orthogonal map: nonexpansive, and Picard iteration never gets closer to 0."""
    size += size % 2
    skew = normal(generator, size, size)
    turn = torch.linalg.matrix_exp(0.3 * (skew - skew.T))
    start = normal(generator, size)
    return KnownProblem(
        problem=fixed_point(lambda x: turn @ x, start),
        kind="cocoercive",
        solution=torch.zeros_like(start),
        error=lambda x: float((x - turn @ x).norm()),
        allows=lambda x, residual: residual,
    )
