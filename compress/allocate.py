"""How many components each layer keeps under one budget.

``uniform`` keeps the same fraction everywhere; ``certified`` minimises the bound
``sum_l D_l eps_l(k_l)`` on the expected output deviation, where ``eps_l`` is the refitted error
curve of layer ``l`` and ``D_l`` how much the certificate lets the rest of the network amplify it;
``rms`` minimises ``sum_l (D_l eps_l)^2``, the same for layer errors that do not add up in phase.
The first is a bound but concave in practice: it tends to empty one layer. The second spreads.
Source: own derivation from the error recursion of the certificate.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from common.config import one_of
from common.errors import ConfigError

EXACT_LIMIT = 10**9
"""Elementary steps up to which the knapsack is solved exactly."""
_REMEDY = "lower compress.min_keep or compress.align, or raise compress.keep"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """What removing components costs in one layer.

    Attributes:
        components: Components before pruning.
        cost: Budget units freed by one component.
        errors: ``eps(r)``: root of the mean squared error after removing ``r`` components,
            r = 0 .. ``len(errors) - 1``; the last one is the most that may be removed.
        amplification: ``D_l``, output deviation per unit of error.
    """

    components: int
    cost: int
    errors: Sequence[float]
    amplification: float = 1.0

    def options(self, align: int) -> list[int]:
        """Return the admissible numbers of removed components, 0 among them, ascending."""
        return [
            removed
            for removed in range(len(self.errors))
            if removed == 0 or (self.components - removed) % align == 0
        ]


Allocator = Callable[[Sequence[Curve], float, int], list[int]]


def allocate(
    curves: Sequence[Curve], keep: float, method: str = "certified", *, align: int = 1
) -> list[int]:
    """Return the number of components each layer keeps.

    Args:
        curves: One per layer.
        keep: Fraction of the total cost that may stay, in (0, 1].
        method: Name in ``ALLOCATORS``.
        align: Kept numbers are multiples of this, except in untouched layers.

    Returns:
        Kept components per layer; their total cost never exceeds the budget.

    Raises:
        ConfigError: for an unknown method or when the curves do not reach the budget.
    """
    one_of("compress.allocation", method, ALLOCATORS)
    reach = sum(curve.cost * curve.options(align)[-1] for curve in curves)
    if reach < needed(curves, keep):
        raise ConfigError(
            f"compress.keep={keep}: the layers' least kept numbers leave at most {reach} of the "
            f"{needed(curves, keep)} units to remove; {_REMEDY}"
        )
    removed = ALLOCATORS[method](curves, keep, align)
    return [curve.components - gone for curve, gone in zip(curves, removed, strict=True)]


def needed(curves: Sequence[Curve], keep: float) -> int:
    """Return the budget units that have to go, rounded up."""
    total = sum(curve.cost * curve.components for curve in curves)
    return math.ceil(total * (1 - keep) - 1e-9 * total)


def objective(curves: Sequence[Curve], kept: Sequence[int]) -> float:
    """Return ``sum_l D_l eps_l``, the quantity that ``certified`` minimises."""
    return sum(
        curve.amplification * float(curve.errors[curve.components - count])
        for curve, count in zip(curves, kept, strict=True)
    )


def _uniform(curves: Sequence[Curve], keep: float, align: int) -> list[int]:
    removed = []
    for curve in curves:
        wanted = math.ceil(curve.components * (1 - keep) - 1e-9 * curve.components)
        larger = [option for option in curve.options(align) if option >= wanted]
        if not larger:
            raise ConfigError(
                f"compress.keep={keep}: a layer of {curve.components} components cannot lose "
                f"{wanted}; {_REMEDY}"
            )
        removed.append(larger[0])
    return removed


def _certified(curves: Sequence[Curve], keep: float, align: int) -> list[int]:
    """Exact knapsack where it is affordable, else greedy on the lower convex hulls."""
    need = needed(curves, keep)
    unit = math.gcd(*(curve.cost for curve in curves))
    steps = -(-need // unit) * sum(len(curve.options(align)) for curve in curves)
    return _knapsack(curves, need, align) if steps <= EXACT_LIMIT else _hull(curves, need, align)


def _rms(curves: Sequence[Curve], keep: float, align: int) -> list[int]:
    squared = [
        dataclasses.replace(
            curve,
            errors=[(curve.amplification * float(error)) ** 2 for error in curve.errors],
            amplification=1.0,
        )
        for curve in curves
    ]
    return _certified(squared, keep, align)


def _knapsack(curves: Sequence[Curve], need: int, align: int) -> list[int]:
    """Dynamic programme over layers; its state is the number of units removed so far."""
    unit = math.gcd(*(curve.cost for curve in curves))
    goal = -(-need // unit)
    best = np.full(goal + 1, np.inf)
    best[0] = 0.0
    choices = []
    for curve in curves:
        fresh = np.full(goal + 1, np.inf)
        choice = np.zeros((goal + 1, 2), dtype=np.int64)
        for removed in curve.options(align):
            shift = min(removed * (curve.cost // unit), goal)
            value = best + curve.amplification * float(curve.errors[removed])
            _relax(fresh, choice, value, shift, removed)
        best = fresh
        choices.append(choice)
    state, counts = goal, []
    for choice in reversed(choices):
        counts.append(int(choice[state, 0]))
        state = int(choice[state, 1])
    return counts[::-1]


def _relax(
    fresh: np.ndarray, choice: np.ndarray, value: np.ndarray, shift: int, removed: int
) -> None:
    """Offer ``removed`` as the choice that leads from each state to the one ``shift`` higher."""
    goal = len(fresh) - 1
    sources = np.arange(goal + 1 - shift)
    better = value[: goal + 1 - shift] < fresh[shift:]
    fresh[shift:][better] = value[: goal + 1 - shift][better]
    choice[shift:, 0][better] = removed
    choice[shift:, 1][better] = sources[better]
    # States past the goal count as the goal.
    if shift and (rest := value[goal + 1 - shift :]).size and rest.min() < fresh[goal]:
        fresh[goal] = rest.min()
        choice[goal] = removed, goal + 1 - shift + int(rest.argmin())


def _hull(curves: Sequence[Curve], need: int, align: int) -> list[int]:
    """Remove along the steepest hull segments; only the last one is taken in part."""
    segments = []
    for index, curve in enumerate(curves):
        corners = _lower_hull(curve, align)
        for (start, low), (end, high) in itertools.pairwise(corners):
            segments.append(((high - low) / (curve.cost * (end - start)), index, end))
    removed = [0] * len(curves)
    freed = 0
    for _, index, end in sorted(segments):
        curve = curves[index]
        left = need - freed
        if left <= 0:
            break
        enough = removed[index] + -(-left // curve.cost)
        target = next((o for o in curve.options(align) if enough <= o <= end), end)
        freed += curve.cost * (target - removed[index])
        removed[index] = target
    return removed


def _lower_hull(curve: Curve, align: int) -> list[tuple[int, float]]:
    hull: list[tuple[int, float]] = []
    for removed in curve.options(align):
        point = (removed, curve.amplification * float(curve.errors[removed]))
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


ALLOCATORS: dict[str, Allocator] = {
    "certified": _certified,
    "rms": _rms,
    "uniform": _uniform,
}
