"""Freeing a given amount at the least loss."""

import itertools

import numpy as np
import pytest

from compress.budgets import knapsack
from compress.budgets.knapsack import Menu, cheapest, common_unit, dynamic_programme, hull_greedy


def menus(seed: int, layers: int = 3, size: int = 7, *, convex: bool = False) -> list[Menu]:
    """Return menus of whole units; equal steps and rising losses per step when convex."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        gains = np.ones(size) if convex else generator.integers(1, 5, size)
        steps = generator.random(size)
        steps = np.sort(steps) if convex else steps
        freed = np.concatenate([[0.0], np.cumsum(gains)])
        found.append(Menu(np.arange(size + 1), freed, np.concatenate([[0.0], np.cumsum(steps)])))
    return found


def loss(layers: list[Menu], removed: list[int]) -> float:
    """Return the total loss; options are numbered like the components they remove."""
    return sum(float(menu.loss[r]) for menu, r in zip(layers, removed, strict=True))


def freed(layers: list[Menu], removed: list[int]) -> float:
    """Return the units freed."""
    return sum(float(menu.freed[r]) for menu, r in zip(layers, removed, strict=True))


def optimum(layers: list[Menu], need: float) -> float:
    """Return the least loss of all combinations."""
    choices = itertools.product(*(menu.removed.tolist() for menu in layers))
    return min(loss(layers, c) for c in choices if freed(layers, c) >= need)


@pytest.mark.parametrize("need", [1, 9, 20])
@pytest.mark.parametrize("seed", range(8))
def test_programme_finds_the_optimum(seed, need):
    """Oracle: all combinations."""
    layers = menus(seed)
    found = dynamic_programme(layers, need, 1.0)
    assert freed(layers, found) >= need
    assert loss(layers, found) == pytest.approx(optimum(layers, need))


@pytest.mark.parametrize("need", [1, 8, 17, 21])
@pytest.mark.parametrize("seed", range(8))
def test_hull_greedy_equals_the_programme_on_convex_curves(seed, need):
    """Oracle: the exact programme; unit steps, where the greedy choice is optimal."""
    layers = menus(seed, convex=True)
    exact = loss(layers, dynamic_programme(layers, need, 1.0))
    assert loss(layers, hull_greedy(layers, need)) == pytest.approx(exact)


@pytest.mark.parametrize("seed", range(8))
def test_hull_greedy_is_feasible_and_close_on_any_curves(seed):
    """Oracle: the optimum; the greedy answer exceeds it by less than one option's loss."""
    layers = menus(seed, layers=6, size=9)
    need = 0.5 * sum(float(menu.freed[-1]) for menu in layers)
    found = hull_greedy(layers, need)
    best = loss(layers, dynamic_programme(layers, need, 1.0))
    widest = max(float(menu.loss[-1]) for menu in layers)
    assert freed(layers, found) >= need
    assert best - 1e-12 <= loss(layers, found) <= best + widest


@pytest.mark.parametrize("unit", [0.7, 2.0, 3.3])
@pytest.mark.parametrize("seed", range(4))
def test_coarse_units_never_free_too_little(seed, unit):
    """Every option counts for no more than it frees, so the need is met in true units."""
    layers = menus(seed)
    found = dynamic_programme(layers, 12, unit)
    assert freed(layers, found) >= 12
    assert loss(layers, found) >= optimum(layers, 12) - 1e-12


def test_coarse_units_may_put_the_need_out_of_reach(monkeypatch):
    """By hand: nothing but all options free enough; the greedy answer takes over."""
    layers = menus(0)
    reach = sum(float(menu.freed[-1]) for menu in layers)
    assert dynamic_programme(layers, reach, 0.9 * reach) is None
    monkeypatch.setattr(knapsack, "EXACT_LIMIT", 0)
    monkeypatch.setattr(knapsack, "QUANTA", 1)
    assert cheapest(layers, reach) == [7, 7, 7]


@pytest.mark.parametrize("seed", range(4))
def test_large_problems_take_the_better_of_both_approximations(seed, monkeypatch):
    """Oracle: both, computed apart; with a unit of 1 the coarse one is exact."""
    layers = menus(seed)
    reach = sum(float(menu.freed[-1]) for menu in layers)
    monkeypatch.setattr(knapsack, "MOST_CELLS", 0)
    monkeypatch.setattr(knapsack, "QUANTA", 4)
    found = [dynamic_programme(layers, 10, reach / 4), hull_greedy(layers, 10)]
    best = min(loss(layers, removed) for removed in found if removed is not None)
    assert loss(layers, cheapest(layers, 10)) == best
    monkeypatch.setattr(knapsack, "QUANTA", int(reach))
    assert loss(layers, cheapest(layers, 10)) == pytest.approx(optimum(layers, 10))


def test_common_unit_of_whole_and_broken_amounts():
    """By hand."""
    whole = Menu(np.arange(3), np.array([0.0, 12, 18]), np.zeros(3))
    broken = Menu(np.arange(2), np.array([0.0, 0.5]), np.zeros(2))
    assert common_unit([whole, whole]) == 6
    assert common_unit([whole, broken]) == 0
