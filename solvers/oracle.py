"""The only view that a solver has of a problem: packed points, counted evaluations."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.errors import ConfigError
from solvers.problem import Problem
from solvers.structure import Structure, norm

if TYPE_CHECKING:
    from solvers.sampling import Draw
    from solvers.solution import State


class Oracle:
    """Evaluates a problem on packed points and counts what that costs.

    Attributes:
        problem: What is asked.
        structure: Layout of the user's points.
        full_evals: Evaluations of the whole ``F`` so far.
        component_evals: Evaluations of single components so far, full ones not included.
        lipschitz_floor: Constants below this are known to be too small (recovery, warm start).
        lipschitz_source: ``given``, ``power`` or ``backtracked``: origin of the first constant.
        warm: Last state of the run that this one continues; methods may read more than L from it.
        first: Point and value of the first evaluation; None before it.
        nonfinite: Values that were not finite so far, where a method counted them.
        last: Point of the last full evaluation.
        scale: Norm of ``F`` at the start on the tangent space of the domain of G, where known.
    """

    def __init__(self, problem: Problem, warm: "State | None" = None) -> None:
        self.problem = problem
        self.structure = Structure.of(problem.start)
        self.full_evals = 0
        self.component_evals = 0
        self.lipschitz_floor = 0.0
        self.warm = warm
        self.scale = 0.0
        self.nonfinite = 0
        self.lipschitz_source = "given" if problem.lipschitz_bound is not None else "backtracked"
        self.first: tuple[Tensor, Tensor] | None = None
        self.last: Tensor | None = None

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
        self.last = point
        # A copy, because an operator may write to one buffer again and again.
        return self.attached(point).detach().to(point.dtype, copy=True)

    def attached(self, point: Tensor) -> Tensor:
        """Return ``F(point)`` with its graph; the caller counts it."""
        return self.structure.pack(self.problem.full(self.structure.unpack(point)), "operator")

    def precise(self, point: Tensor) -> Tensor:
        """Return ``F(point)`` computed in float64, or in the point's dtype where F refuses that."""
        if point.dtype != torch.float64:
            try:
                return self.full(point.double())
            except (RuntimeError, TypeError):  # parameters of another dtype, or no float64 at all
                self.full_evals -= 1
        return self.full(point)

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
        # A copy, because a resolvent may work in place and the caller still needs the argument.
        value = resolvent(self.structure.unpack(point.clone()), step)
        return self.structure.pack(value, "resolvent").detach().to(point.dtype)

    def first_value(self, point: Tensor) -> Tensor:
        """Return ``F(point)`` and refuse an operator that is no function that can be iterated.

        Raises:
            ConfigError: when the point or the value there holds NaN or infinity, or the argument
                was overwritten.
        """
        if not bool(torch.isfinite(point).all()):
            raise ConfigError("resolvent: its value at the start is not finite; correct it")
        before = point.clone()
        value = self.full(point)
        if not torch.equal(point, before):
            raise ConfigError("operator: overwrites its argument; return a new tensor")
        if not bool(torch.isfinite(value).all()):
            raise ConfigError(
                "operator: its value at the start is not finite; correct the operator or the start"
            )
        if self.first is None:
            self.first = (point, value)
            if (project := self.of_resolvent("tangent_projection")) is not None:
                tangent = project(self.structure.unpack(value))
                self.scale = norm(self.structure.pack(tangent, "tangent_projection"))
        return value

    def diameter(self) -> float | None:
        """Return the diameter of the domain of ``G`` where the resolvent states it."""
        diameter = self.of_resolvent("diameter")
        return diameter(self.problem.start) if callable(diameter) else diameter

    def of_resolvent(self, name: str) -> Any:
        """Return an optional attribute of the resolvent, None where it has none."""
        return getattr(self.problem.resolvent, name, None)
