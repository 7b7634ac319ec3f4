"""Monotone inclusions ``0 in F(u) + G(u)`` and the oracle through which a solver sees them.

``F`` is single valued (or a finite sum of components), ``G`` is known through its resolvent
``J(z, step) = (I + step * G)^-1 (z)``; no resolvent means ``G = 0``. Source: arXiv 2310.02987.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import positive
from common.errors import ConfigError, ShapeError

Map = Callable[[Tensor], Tensor]
Resolvent = Callable[[Tensor, float], Tensor]

_PROBE_SIZE = 1e-3  # relative length of the probe that estimates a Lipschitz constant
_PROBE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Inclusion:
    """One operator ``F``, one resolvent, and what is known about them.

    Attributes:
        operator: ``F``, a map from a tensor like ``start`` to one of the same shape.
        start: First point and anchor; any shape, floating dtype, any device.
        resolvent: ``J(z, step)`` of ``G`` for ``step > 0``; None for ``G = 0``.
        lipschitz_bound: L such that F is L-Lipschitz (1/L-cocoercive where ``cocoercive``).
        lipschitz_est: A guess of L; the methods then enlarge it when F contradicts it.
        cocoercive: False forbids the methods that need cocoercivity; None means unknown.

    Raises:
        ConfigError: for a constant that is negative, infinite or not a number, or a start that
            is not finite.
        ShapeError: for a start that is not a floating tensor.
    """

    operator: Map
    start: Tensor
    resolvent: Resolvent | None = None
    lipschitz_bound: float | None = None
    lipschitz_est: float | None = None
    cocoercive: bool | None = None

    def __post_init__(self) -> None:
        """Refuse constants and starting points that no theory covers."""
        for name in ("lipschitz_bound", "lipschitz_est"):
            if (value := getattr(self, name)) is not None:
                positive(name, value, zero=True)
        _check_start(self.start)

    @property
    def num_components(self) -> int:
        """Component calls that one full evaluation costs."""
        return 1

    def full(self, point: Tensor) -> Tensor:
        """Return ``F(point)``."""
        return self.operator(point)


@dataclass(frozen=True, kw_only=True)
class FiniteSumInclusion:
    """``F = (1/N) sum_i F_i`` with components that can be sampled.

    Attributes:
        components: ``components(z, index_N, weight_N)`` returns ``sum_j weight_j F_index_j(z)``;
            ``index`` int64 and ``weight`` (dtype of ``start``), both of shape (number drawn,).
        num_components: N, at least 1.
        start: First point and anchor.
        resolvent: As in :class:`Inclusion`.
        lipschitz_bound: L of the mean operator F.
        lipschitz_est: A guess of the same.
        component_lipschitz: (N,) constants ``L_i`` of the components, for importance sampling.
        cocoercive: As in :class:`Inclusion`.

    Raises:
        ConfigError: for constants that are negative or not finite, or ``num_components < 1``.
        ShapeError: for a start that is not a floating tensor, or constants of the wrong length.
    """

    components: Callable[[Tensor, Tensor, Tensor], Tensor]
    num_components: int
    start: Tensor
    resolvent: Resolvent | None = None
    lipschitz_bound: float | None = None
    lipschitz_est: float | None = None
    component_lipschitz: Tensor | None = None
    cocoercive: bool | None = None

    def __post_init__(self) -> None:
        """Refuse constants and starting points that no theory covers."""
        for name in ("lipschitz_bound", "lipschitz_est"):
            if (value := getattr(self, name)) is not None:
                positive(name, value, zero=True)
        if self.num_components < 1:
            raise ConfigError(f"num_components={self.num_components}: expected at least 1")
        _check_start(self.start)
        if (constants := self.component_lipschitz) is not None:
            if constants.shape != (self.num_components,):
                raise ShapeError(
                    f"component_lipschitz: expected ({self.num_components},), "
                    f"got {tuple(constants.shape)}; give one constant per component"
                )
            if not bool(torch.isfinite(constants).all() and (constants >= 0).all()):
                raise ConfigError("component_lipschitz: expected finite constants of at least 0")

    def full(self, point: Tensor) -> Tensor:
        """Return the mean over all components at ``point``."""
        index_N = torch.arange(self.num_components, device=self.start.device)
        weight_N = self.start.new_full((self.num_components,), 1 / self.num_components)
        return self.components(point, index_N, weight_N)


Problem = Inclusion | FiniteSumInclusion


def fixed_point(mapping: Map, start: Tensor, *, averagedness: float = 1.0) -> Inclusion:
    """Return the inclusion whose zeros are the fixed points of a nonexpansive map ``T``.

    Args:
        mapping: ``T``; nonexpansive in the Euclidean norm.
        start: First point and anchor.
        averagedness: ``alpha`` in (0, 1] when ``T`` is alpha-averaged (1/2: firmly nonexpansive,
            for example a projection); smaller values allow longer steps.

    Returns:
        ``F = I - T``, which is ``1/(2 alpha)``-cocoercive, so ``L = 2 alpha``.

    Raises:
        ConfigError: for an averagedness outside (0, 1].
    """
    if not 0 < averagedness <= 1:
        raise ConfigError(f"averagedness={averagedness}: expected above 0 and at most 1")
    return Inclusion(
        operator=lambda point: point - mapping(point),
        start=start,
        lipschitz_bound=2 * averagedness,
        cocoercive=True,
    )


class Oracle:
    """The only view a solver has of a problem; it counts component calls.

    Attributes:
        calls: Component evaluations so far.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.calls = 0

    @property
    def has_resolvent(self) -> bool:
        """Whether ``G`` is present."""
        return self.problem.resolvent is not None

    def full(self, point: Tensor) -> Tensor:
        """Return ``F(point)``; costs ``num_components`` calls.

        Raises:
            ShapeError: when the operator returns another shape than it was given.
        """
        self.calls += self.problem.num_components
        value = self.problem.full(point).detach()
        if value.shape != point.shape:
            raise ShapeError(
                f"operator: expected the shape {tuple(point.shape)} of its argument, "
                f"got {tuple(value.shape)}; return one value per coordinate"
            )
        return value

    def resolvent(self, point: Tensor, step: float) -> Tensor:
        """Return ``J(point, step)``, the point itself when ``G = 0``."""
        resolvent = self.problem.resolvent
        return point if resolvent is None else resolvent(point, step).detach()

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


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm of all entries, accumulated in float64."""
    return float(torch.linalg.vector_norm(tensor.double()))


def inner(left: Tensor, right: Tensor) -> float:
    """Return the inner product of two tensors of one shape, accumulated in float64."""
    return float((left.double() * right.double()).sum())


def _check_start(start: Tensor) -> None:
    if not isinstance(start, Tensor) or not start.is_floating_point() or start.numel() == 0:
        raise ShapeError("start: expected a floating-point tensor with at least one entry")
    if not bool(torch.isfinite(start).all()):
        raise ConfigError("start: expected finite entries; remove NaN and infinity")
