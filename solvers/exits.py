"""When a run ends: its limits, and the sign that there is nothing to converge to."""

from dataclasses import dataclass

from torch import Tensor

from common.config import check_types, positive
from solvers.structure import norm

_FIRST_TEST = 32  # iteration of the first test for a missing solution
_SPACING = 1.5  # ratio of the iterations of two tests
_PLATEAU = 0.99  # the best residual must stay above this part of what it was
_GROWTH = 1.4  # and the distance from the start must grow by this factor
_TESTS = 10  # in this many tests on end (spec 7.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When to stop.

    Attributes:
        atol: Absolute tolerance of the residual, >= 0.
        rtol: Tolerance relative to the larger of the first residual and the norm of F at the start
            on the tangent space (where the resolvent offers its projection), >= 0.
        max_iterations: Limit of steps.
        max_calls: Limit of component evaluations, None for none; tested between steps.
        time_limit: Limit in seconds, None for none; tested between steps.
    """

    atol: float = 1e-6
    rtol: float = 0.0
    max_iterations: int = 100_000
    max_calls: int | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        """Validate every field."""
        check_types(self, prefix="")
        for name in ("atol", "rtol", "max_iterations"):
            positive(name, getattr(self, name), zero=True)
        for name in ("max_calls", "time_limit"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)


class Drift:
    """Watches for points that run away while the residual stays.

    A method with rate 1/k shrinks its residual by the spacing between two tests when a solution
    exists; where none does, each step moves by the same displacement. A solution that is more
    than a thousand steps away looks the same, hence *suspected*.

    Attributes:
        displacement: Mean move per iteration between the last two tests.
    """

    def __init__(self, start: Tensor, residual: float) -> None:
        self.displacement: Tensor | None = None
        self._start = self._point = start
        self._residual, self._distance = residual, 0.0
        self._iteration, self._next, self._hits = 0, float(_FIRST_TEST), 0

    def suspects(self, iteration: int, point: Tensor, best_residual: float) -> bool:
        """Return whether the evidence is complete, given the state at an iteration."""
        if iteration < self._next:
            return False
        distance = norm(point - self._start)
        stays = best_residual >= _PLATEAU * self._residual
        grows = distance >= _GROWTH * self._distance and distance > 0
        self._hits = self._hits + 1 if stays and grows else 0
        self.displacement = (point - self._point) / (iteration - self._iteration)
        self._point, self._distance, self._residual = point, distance, best_residual
        self._iteration, self._next = iteration, iteration * _SPACING
        return self._hits >= _TESTS
