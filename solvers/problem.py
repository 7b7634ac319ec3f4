"""Monotone inclusions ``0 in F(u) + G(u)``.

``F`` is single valued (or a finite sum of components), ``G`` is known through its resolvent
``J(z, step) = (I + step * G)^-1 (z)``; no resolvent means ``G = 0``. Source: arXiv 2310.02987.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.config import positive
from common.errors import ConfigError
from solvers.finite_sum import FiniteSumInclusion
from solvers.structure import Value, check_start

Map = Callable[[Any], Any]  # from a value like the start to one of the same structure
Resolvent = Callable[[Any, float], Any]


@dataclass(frozen=True, kw_only=True)
class Inclusion:
    """One operator ``F``, one resolvent, and what is known about them.

    Attributes:
        operator: ``F``, from a value structured like ``start`` to another one.
        start: First point and anchor: a floating tensor of any shape on any device, or a tuple
            of such; then operator and resolvent take and return tuples as well.
        resolvent: ``J(z, step)`` of ``G`` for ``step > 0``; None for ``G = 0``.
        lipschitz_bound: L such that F is L-Lipschitz (1/L-cocoercive where ``cocoercive``).
        lipschitz_est: A guess of L; the methods then enlarge it when F contradicts it.
        cocoercive: False forbids the methods that need cocoercivity; None means unknown.
        linear: Whether F is linear (affine), so that its norm can be found by power iteration.

    Raises:
        ConfigError: for a constant that is negative, infinite or not a number, or a start that
            is not finite.
        ShapeError: for a start that is not a floating tensor.
    """

    operator: Map
    start: Value
    resolvent: Resolvent | None = None
    lipschitz_bound: float | None = None
    lipschitz_est: float | None = None
    cocoercive: bool | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        """Refuse constants and starting points that no theory covers."""
        for name in ("lipschitz_bound", "lipschitz_est"):
            if (value := getattr(self, name)) is not None:
                positive(name, value, zero=True)
        check_start(self.start)

    @property
    def num_components(self) -> int:
        """Component calls that one full evaluation costs."""
        return 1

    def full(self, point: Value) -> Any:
        """Return ``F(point)``."""
        return self.operator(point)


Problem = Inclusion | FiniteSumInclusion


def fixed_point(mapping: Map, start: Value, *, averagedness: float = 1.0) -> Inclusion:
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
        operator=lambda point: _minus(point, mapping(point)),
        start=start,
        lipschitz_bound=2 * averagedness,
        cocoercive=True,
    )


def _minus(left: Value, right: Value) -> Value:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return left - right  # type: ignore[operator]
    return tuple(a - b for a, b in zip(left, right, strict=True))
