"""How many components each layer keeps when a given amount has to go.

``uniform`` removes the same fraction everywhere; ``global`` compares standardised scores of all
layers with one threshold; ``certified`` minimises the bound ``sum_l D_l eps_l(k_l)`` on the
expected output deviation, where ``eps_l`` is the refitted error curve of layer ``l`` and ``D_l``
how much the certificate lets the rest of the network amplify it; ``rms`` minimises
``sum_l (D_l eps_l)^2``, the same for layer errors that do not add up in phase. ``certified`` is a
bound but concave in practice: it tends to empty one layer. ``rms`` spreads.
Source: own derivation from the error recursion of the certificate; ``global`` after FLAP.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from common.config import one_of
from common.errors import ConfigError
from compress.budgets.knapsack import Menu, cheapest, in_order

SLACK = 1e-12
"""Relative; absorbs the rounding of ``total * (1 - keep)``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curve:
    """What removing components costs in one layer, and what it frees.

    Attributes:
        components: Components before pruning.
        cost: Budget units freed by one component, or a table of what removing ``r`` of them
            frees, r = 0 .. ``components``: from 0, never falling.
        errors: ``eps(r)``: root of the mean squared error after removing ``r`` components,
            r = 0 .. ``len(errors) - 1``, never falling; the last one is the most that may be
            removed.
        amplification: ``D_l``, output deviation per unit of error.
        align: Kept numbers are multiples of this.
        allowed: The only kept numbers that are admissible; None admits all.
    """

    components: int
    cost: float | Sequence[float]
    errors: Sequence[float]
    amplification: float = 1.0
    align: int = 1
    allowed: frozenset[int] | None = None

    def __post_init__(self) -> None:
        """Check a table of costs."""
        if isinstance(self.cost, (int, float)):
            return
        table = np.asarray(self.cost, dtype=np.float64)
        assert len(table) == self.components + 1, "the table needs one entry per number removed"
        assert table[0] == 0, "removing nothing frees nothing"
        assert (np.diff(table) >= 0).all(), "the table must never fall"

    @property
    def total(self) -> float:
        """Units that removing everything would free."""
        return float(self.freed(np.array(self.components)))

    def freed(self, removed: np.ndarray) -> np.ndarray:
        """Return the units freed by each of the given numbers of removed components."""
        if isinstance(self.cost, (int, float)):
            return removed * float(self.cost)
        return np.asarray(self.cost, dtype=np.float64)[removed]

    def options(self) -> np.ndarray:
        """Return the admissible numbers of removed components, 0 among them, ascending."""
        kept = self.components - np.arange(len(self.errors))
        admissible = kept % self.align == 0
        if self.allowed is not None:
            admissible &= np.isin(kept, list(self.allowed))
        admissible[0] = True
        return admissible.nonzero()[0]


Allocator = Callable[[Sequence[Curve], float], list[int]]


def allocate(
    curves: Sequence[Curve],
    keep: float,
    method: str = "certified",
    *,
    total: float | None = None,
    name: str = "compress.keep",
) -> list[int]:
    """Return the number of components each layer keeps.

    Args:
        curves: One per layer; one that keeps everything need not respect ``align``.
        keep: Fraction of ``total`` that may stay, in (0, 1].
        method: Name in ``ALLOCATORS``.
        total: Of whatever ``keep`` is meant, in the units of the curves; all that they hold
            together by default.
        name: What messages call ``keep``.

    Returns:
        Kept components per layer; at least ``total * (1 - keep)`` is freed.

    Raises:
        ConfigError: for an unknown method or when the curves do not reach the budget.
    """
    one_of("compress.allocation", method, ALLOCATORS)
    if total is None:
        total = sum(curve.total for curve in curves)
    reach = sum(float(curve.freed(curve.options()[-1])) for curve in curves)
    if reach < needed(total, keep):
        least = math.ceil(1e4 * (1 - reach / total)) / 1e4
        raise ConfigError(
            f"{name}={keep}: expected at least {least:g}, all that the least kept numbers of the "
            f"layers permit; raise {name}, or lower compress.min_keep or compress.align"
        )
    removed = ALLOCATORS[method](curves, needed(total, keep))
    return [curve.components - gone for curve, gone in zip(curves, removed, strict=True)]


def needed(total: float, keep: float) -> float:
    """Return the units that have to go for ``keep`` of ``total`` to stay."""
    return max(total * (1 - keep) - SLACK * total, 0.0)


def objective(curves: Sequence[Curve], kept: Sequence[int]) -> float:
    """Return ``sum_l D_l eps_l``, the quantity that ``certified`` minimises."""
    return sum(
        curve.amplification * float(curve.errors[curve.components - count])
        for curve, count in zip(curves, kept, strict=True)
    )


def _menu(curve: Curve, values: np.ndarray) -> Menu:
    """Return the options that free more than the ones before them; the others are dominated."""
    options = curve.options()
    freed = curve.freed(options)
    useful = np.concatenate([[True], np.diff(freed) > 0])
    return Menu(options[useful], freed[useful], values[options[useful]])


def _uniform(curves: Sequence[Curve], need: float) -> list[int]:
    """Remove the smallest common fraction that frees enough, rounded up to options.

    Layers alike lose the same number. A layer that has lost all it may stays there.
    """
    options = [curve.options() for curve in curves]
    shares = [removed / curve.components for removed, curve in zip(options, curves, strict=True)]
    candidates = np.unique(np.concatenate(shares))

    def removed(share: float) -> list[int]:
        places = [min(int(np.searchsorted(s, share)), len(s) - 1) for s in shares]
        return [int(o[place]) for o, place in zip(options, places, strict=True)]

    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        counts = removed(candidates[middle])
        freed = sum(float(c.freed(np.array(r))) for c, r in zip(curves, counts, strict=True))
        low, high = (low, middle) if freed >= need else (middle + 1, high)
    return removed(candidates[high])


def _global(curves: Sequence[Curve], need: float) -> list[int]:
    """Remove the components of lowest score, whichever layer they are in, until enough is freed.

    A component's score is by how much its removal raised the mean squared error, standardised
    (mean 0, deviation 1) over the removable components of its layer; it goes after all that were
    removed before it, and with ``align`` or ``allowed`` only together with its whole step.
    """
    menus = [_menu(curve, np.asarray(curve.errors, dtype=np.float64)) for curve in curves]
    keys = []
    for curve, menu in zip(curves, menus, strict=True):
        scores = np.diff(np.square(np.asarray(curve.errors, dtype=np.float64)))
        latest = np.maximum.accumulate(_standardised(scores)) if len(scores) else scores
        keys.append(latest[menu.removed[1:] - 1])
    return in_order(menus, keys, need)


def _standardised(scores: np.ndarray) -> np.ndarray:
    # Scores that differ by rounding only count as equal.
    floor = max(SLACK * float(np.abs(scores).max()), np.finfo(np.float64).tiny)
    return (scores - scores.mean()) / max(float(scores.std()), floor)


def _certified(curves: Sequence[Curve], need: float) -> list[int]:
    return _minimise(curves, need, power=1)


def _rms(curves: Sequence[Curve], need: float) -> list[int]:
    return _minimise(curves, need, power=2)


def _minimise(curves: Sequence[Curve], need: float, *, power: int) -> list[int]:
    """Minimise ``sum_l (D_l eps_l) ** power``, never worse than ``uniform`` (see ``cheapest``)."""
    values = [(c.amplification * np.asarray(c.errors, dtype=np.float64)) ** power for c in curves]
    menus = [_menu(curve, value) for curve, value in zip(curves, values, strict=True)]
    found = [cheapest(menus, need), _uniform(curves, need)]

    def loss(removed: list[int]) -> float:
        return sum(float(value[count]) for value, count in zip(values, removed, strict=True))

    return min(found, key=loss)


ALLOCATORS: dict[str, Allocator] = {
    "certified": _certified,
    "global": _global,
    "rms": _rms,
    "uniform": _uniform,
}
