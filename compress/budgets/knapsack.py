"""Free a given amount at the least loss: one option per layer, the losses add up.

``cheapest`` solves it exactly where the amounts are whole numbers of a common unit and the
programme over layers and units is affordable. Elsewhere (latency in seconds, units without a
large common divisor) it takes the better of two feasible answers: the same programme on coarser
units, in which every option counts for no more than it frees, and a greedy walk along the lower
convex hulls, which is optimal up to one step where the curves are convex.
Source: textbook dynamic programming and Lagrangian relaxation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXACT_LIMIT = 10**9
"""Elementary steps up to which the knapsack is solved exactly."""
MOST_CELLS = 10**7
"""Stored values of the programme, 8 bytes each, up to which it is solved exactly."""
QUANTA = 20_000
"""Coarse units that everything removable is divided into."""


class Menu(NamedTuple):
    """Options of one layer; the first one removes nothing.

    Attributes:
        removed: Components removed, ascending.
        freed: Units freed, strictly ascending from 0.
        loss: Never falling.
    """

    removed: np.ndarray
    freed: np.ndarray
    loss: np.ndarray


def cheapest(menus: Sequence[Menu], need: float) -> list[int]:
    """Return the components removed per layer that free ``need`` at the least total loss.

    Args:
        menus: One per layer.
        need: Units; at most what all last options free together.

    Returns:
        The optimum for whole units within ``EXACT_LIMIT``, else the better of two feasible
        approximations. What is freed never falls short.
    """
    unit = common_unit(menus)
    if unit and _is_affordable(menus, need, unit):
        exact = dynamic_programme(menus, need, unit)
        assert exact is not None, "the last options together free enough"
        return exact
    reach = sum(float(menu.freed[-1]) for menu in menus)
    greedy = hull_greedy(menus, need)
    coarse = dynamic_programme(menus, need, reach / QUANTA) if reach else None
    return min((greedy, coarse or greedy), key=lambda removed: _loss(menus, removed))


def common_unit(menus: Sequence[Menu]) -> float:
    """Return the greatest common divisor of all amounts, 0 where they are no whole numbers."""
    amounts = np.concatenate([menu.freed for menu in menus])
    if (amounts != np.floor(amounts)).any():
        return 0.0
    return float(np.gcd.reduce(amounts.astype(np.int64)))


def dynamic_programme(menus: Sequence[Menu], need: float, unit: float) -> list[int] | None:
    """Return the optimum when every option frees its amount rounded down to whole units.

    Args:
        menus: One per layer.
        need: In the same units as the amounts; rounded up.
        unit: Above 0; with a common divisor of all amounts nothing is rounded.

    Returns:
        Components removed per layer, or None where rounding puts ``need`` out of reach.
    """
    goal = math.ceil(need / unit)
    best = np.full(goal + 1, np.inf)
    best[0] = 0.0
    scratch = np.empty_like(best)
    stages, tables = [], [best]
    for menu in menus:
        units = np.minimum(np.floor(menu.freed / unit), goal).astype(np.int64)
        # Of the options that free equally many units, the first loses least.
        shifts, first = np.unique(units, return_index=True)
        stages.append((shifts, menu.loss[first], menu.removed[first]))
        best = _with_layer(best, shifts, menu.loss[first], scratch)
        tables.append(best)
    return _trace(stages, tables) if np.isfinite(best[goal]) else None


def hull_greedy(menus: Sequence[Menu], need: float) -> list[int]:
    """Return the components removed per layer by walking down the steepest hull segments.

    Args:
        menus: One per layer.
        need: Units.
    """
    return in_order(menus, [_hull_slopes(menu) for menu in menus], need)


def in_order(menus: Sequence[Menu], keys: Sequence[np.ndarray], need: float) -> list[int]:
    """Take the steps of all layers in ascending order of their keys until enough is freed.

    Args:
        menus: One per layer.
        keys: Per layer, one for each option but the first; never falling.
        need: Units.

    Returns:
        Components removed per layer.
    """
    layer = np.concatenate([np.full(len(key), index) for index, key in enumerate(keys)])
    removed = np.concatenate([menu.removed[1:] for menu in menus])
    gain = np.concatenate([np.diff(menu.freed) for menu in menus])
    order = np.lexsort((removed, layer, np.concatenate(list(keys))))
    count = int(np.searchsorted(np.cumsum(gain[order]), need)) + 1 if need > 0 else 0
    result = np.zeros(len(menus), dtype=np.int64)
    np.maximum.at(result, layer[order[:count]], removed[order[:count]])
    return [int(value) for value in result]


def _is_affordable(menus: Sequence[Menu], need: float, unit: float) -> bool:
    states = math.ceil(need / unit) + 1
    steps = states * sum(len(menu.removed) for menu in menus)
    return steps <= EXACT_LIMIT and states * len(menus) <= MOST_CELLS


def _with_layer(
    best: np.ndarray, shifts: np.ndarray, losses: np.ndarray, scratch: np.ndarray
) -> np.ndarray:
    """Return the least loss of freeing at least s units, s = 0 .. goal, with one more layer."""
    fresh = np.full_like(best, np.inf)
    for shift, loss in zip(shifts.tolist(), losses.tolist(), strict=True):
        value = np.add(best[: len(best) - shift], loss, out=scratch[shift:])
        np.minimum(fresh[shift:], value, out=fresh[shift:])
    # What frees more also frees at least s.
    return np.minimum.accumulate(fresh[::-1])[::-1]


def _trace(
    stages: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], tables: Sequence[np.ndarray]
) -> list[int]:
    state, counts = len(tables[0]) - 1, []
    for (shifts, losses, removed), best in zip(stages[::-1], tables[-2::-1], strict=True):
        before = np.maximum(state - shifts, 0)
        choice = int(np.argmin(best[before] + losses))
        counts.append(int(removed[choice]))
        state = int(before[choice])
    return counts[::-1]


def _hull_slopes(menu: Menu) -> np.ndarray:
    """Return, for each option but the first, the slope of the hull segment it lies above."""
    corners: list[int] = []
    for index in range(len(menu.removed)):
        while len(corners) > 1 and _is_above(menu, corners[-2], corners[-1], index):
            corners.pop()
        corners.append(index)
    slopes = np.diff(menu.loss[corners]) / np.diff(menu.freed[corners])
    # Rounding must not change the order within a layer.
    return np.repeat(np.maximum.accumulate(slopes), np.diff(corners))


def _is_above(menu: Menu, a: int, b: int, c: int) -> bool:
    run, rise = menu.freed, menu.loss
    return bool((rise[b] - rise[a]) * (run[c] - run[a]) >= (rise[c] - rise[a]) * (run[b] - run[a]))


def _loss(menus: Sequence[Menu], removed: Sequence[int]) -> float:
    places = [int(np.searchsorted(m.removed, r)) for m, r in zip(menus, removed, strict=True)]
    return sum(float(m.loss[place]) for m, place in zip(menus, places, strict=True))
