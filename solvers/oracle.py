"""The only view that a solver has of a problem: packed points, counted evaluations."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import ConfigError
from solvers.problem import Problem
from solvers.structure import Structure, norm

if TYPE_CHECKING:
    from solvers.sampling import Draw

_PROBE_SIZE = 1e-3  # relative length of the probe that estimates a Lipschitz constant
_PROBE_SEED = 0


class Oracle:
    """Evaluates a problem on packed points and counts what that costs.

    Attributes:
        problem: What is asked.
        structure: Layout of the user's points.
        full_evals: Evaluations of the whole ``F`` so far.
        component_evals: Evaluations of single components so far, full ones not included.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.structure = Structure.of(problem.start)
        self.full_evals = 0
        self.component_evals = 0

    @property
    def num_components(self) -> int:
        """Components of ``F``; 1 when it is no sum."""
        return self.problem.num_components

    @property
    def calls(self) -> int:
        """Cost so far in component evaluations."""
        return self.num_components * self.full_evals + self.component_evals

    @property
    def has_resolvent(self) -> bool:
        """Whether ``G`` is present."""
        return self.problem.resolvent is not None

    def full(self, point: Tensor) -> Tensor:
        """Return ``F(point)``; costs ``num_components`` calls.

        Raises:
            ShapeError: when the operator returns another shape than it was given.
        """
        self.full_evals += 1
        value = self.problem.full(self.structure.unpack(point))
        return self.structure.pack(value, "operator").detach().to(point.dtype)

    def batch(self, point: Tensor, draw: "Draw") -> Tensor:
        """Return ``sum_j weight_j F_index_j(point)``; costs as many calls as were drawn.

        Raises:
            ConfigError: when the problem has no components.
            ShapeError: when they return another shape than they were given.
        """
        components = getattr(self.problem, "components", None)
        if components is None:
            raise ConfigError("this problem has one operator and nothing to sample from")
        self.component_evals += len(draw.index_M)
        index_M, weight_M = draw.index_M.to(point.device), draw.weight_M.to(point)
        value = components(self.structure.unpack(point), index_M, weight_M)
        return self.structure.pack(value, "components").detach().to(point.dtype)

    def difference(self, new: Tensor, old: Tensor, draw: "Draw") -> Tensor:
        """Return ``sum_j weight_j (F_index_j(new) - F_index_j(old))``; two calls per index."""
        return self.batch(new, draw) - self.batch(old, draw)

    def resolvent(self, point: Tensor, step: float) -> Tensor:
        """Return ``J(point, step)``, the point itself when ``G = 0``."""
        resolvent = self.problem.resolvent
        if resolvent is None:
            return point
        value = resolvent(self.structure.unpack(point), step)
        return self.structure.pack(value, "resolvent").detach().to(point.dtype)

    def first_value(self, point: Tensor) -> Tensor:
        """Return ``F(point)`` and refuse an operator that is not finite there.

        Raises:
            ConfigError: when the value holds NaN or infinity.
        """
        value = self.full(point)
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(
                "operator: its value at the start is not finite; correct the operator or the start"
            )
        return value

    def lipschitz_est(self, point: Tensor, value: Tensor) -> float:
        """Return the slope of F along one random probe from ``point``; 1 where F is constant."""
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        probe = torch.randn(point.shape, generator=generator, dtype=torch.float64)
        probe = probe.to(point) * (_PROBE_SIZE * max(1.0, norm(point)) / max(1e-30, norm(probe)))
        slope = norm(self.full(point + probe) - value) / max(1e-30, norm(probe))
        return slope if 0 < slope < float("inf") else 1.0
