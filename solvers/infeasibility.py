"""Proofs that a saddle point problem over boxes has no solution, from one displacement.

The displacements ``T z - z`` of a method without fixed points tend to a ray that separates
(Farkas). Source: spec halpern_solvers 2.8 and 7.2; the test is that of linear programming duality.
"""

from typing import Literal

import torch
from torch import Tensor

from solvers.resolvents import Box
from solvers.saddle import BilinearSaddle, Point
from solvers.structure import inner, norm

Verdict = Literal["infeasible", "unbounded"]

_RAY_TOL = 1e-6  # violation of the ray over the slope along it; a point would be 1e6 rays away


def no_solution(problem: BilinearSaddle, ray: Point, change: Point) -> Verdict | None:
    """Say which side of a problem has no solution, where a displacement proves it.

    Args:
        problem: The saddle point problem; only boxes on both sides are tested.
        ray: Displacement ``(dx, dy)``.
        change: The change of F along it, ``(A^T dy, -A dx)``.

    Returns:
        ``infeasible`` when no x is finite for all y (for a linear programme: no feasible point),
        ``unbounded`` when no y is finite for all x, None when the ray proves neither.
    """
    if not isinstance(problem.primal, Box) or not isinstance(problem.dual, Box):
        return None
    if _separates(ray[1], problem.offset, problem.dual, -change[0], problem.primal):
        return "infeasible"
    if _separates(ray[0], problem.cost, problem.primal, -change[1], problem.dual):
        return "unbounded"
    return None


def _separates(ray: Tensor, linear: Tensor, own: Box, image: Tensor, other: Box) -> bool:
    """Test that the own function rises for ever along the ray, whatever the other side does."""
    clean = _recession(ray, own)
    size = norm(clean)
    if not 0 < size < float("inf"):
        return False
    low, high = other.ends(image)
    open_up = torch.isinf(high) & (image > 0)
    open_down = torch.isinf(low) & (image < 0)
    loose = torch.where(open_up | open_down, image, 0.0)
    bounded = torch.where(open_up | open_down, 0.0, image)
    slope = -inner(linear, clean) - other.conjugate(bounded)
    violation = norm(loose) + norm(ray - clean)
    return slope > 0 and violation <= _RAY_TOL * slope and slope > _RAY_TOL * size


def _recession(ray: Tensor, box: Box) -> Tensor:
    """Return the nearest direction in which the box has no end."""
    low, high = box.ends(ray)
    ray = torch.where(torch.isinf(low), ray, ray.clamp_min(0))
    return torch.where(torch.isinf(high), ray, ray.clamp_max(0))
