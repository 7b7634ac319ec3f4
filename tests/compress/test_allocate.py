"""Sharing one budget among layers."""

import itertools

import numpy as np
import pytest

from common.errors import ConfigError
from compress import allocate as module
from compress.allocate import Curve, allocate, needed, objective


def curves(seed: int, layers: int = 3, size: int = 6, *, convex: bool = False) -> list[Curve]:
    """Return random error curves, with two different costs unless convex."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(layers):
        steps = generator.random(size)
        steps = np.sort(steps) if convex else steps
        found.append(
            Curve(
                components=size + 1,
                cost=1 if convex else 1 + index % 2,
                errors=[0.0, *np.cumsum(steps)],
                amplification=float(generator.random() + 0.1),
            )
        )
    return found


def brute_force(layers: list[Curve], keep: float, align: int) -> float:
    """Objective of the best admissible choice."""
    choices = itertools.product(*(curve.options(align) for curve in layers))
    need = needed(layers, keep)
    return min(
        objective(layers, [c.components - r for c, r in zip(layers, choice, strict=True)])
        for choice in choices
        if sum(c.cost * r for c, r in zip(layers, choice, strict=True)) >= need
    )


def cost(layers: list[Curve], kept: list[int]) -> int:
    """Return the cost of what is kept."""
    return sum(curve.cost * count for curve, count in zip(layers, kept, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.35])
@pytest.mark.parametrize("align", [1, 2])
def test_knapsack_equals_brute_force(seed, keep, align):
    """Oracle: all combinations; different costs per layer and curves that are not convex."""
    layers = curves(seed)
    kept = allocate(layers, keep, align=align)
    assert objective(layers, kept) == pytest.approx(brute_force(layers, keep, align))
    assert cost(layers, kept) <= keep * cost(layers, [c.components for c in layers]) + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.35])
def test_hull_greedy_equals_the_knapsack_on_convex_curves(seed, keep, monkeypatch):
    """Oracle: the knapsack; unit costs, where the greedy choice is optimal."""
    layers = curves(seed, convex=True)
    exact = objective(layers, allocate(layers, keep))
    monkeypatch.setattr(module, "EXACT_LIMIT", 0)
    assert objective(layers, allocate(layers, keep)) == pytest.approx(exact)


@pytest.mark.parametrize("seed", range(8))
def test_hull_greedy_meets_the_budget_on_any_curves(seed, monkeypatch):
    """Never over budget, and never better than the exact optimum."""
    layers = curves(seed, layers=5, size=9)
    exact = objective(layers, allocate(layers, 0.5, align=2))
    monkeypatch.setattr(module, "EXACT_LIMIT", 0)
    kept = allocate(layers, 0.5, align=2)
    assert cost(layers, kept) <= 0.5 * cost(layers, [c.components for c in layers])
    assert objective(layers, kept) >= exact - 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_uniform_is_never_better_than_certified(seed):
    """Both meet the budget; certified minimises the objective."""
    layers = curves(seed, layers=4, size=11)
    for keep in (0.75, 0.5, 0.25):
        uniform = objective(layers, allocate(layers, keep, "uniform"))
        assert objective(layers, allocate(layers, keep, "certified")) <= uniform + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_rms_minimises_the_sum_of_squares(seed):
    """Oracle: all combinations."""
    layers = curves(seed)
    need = needed(layers, 0.5)

    def squares(removed):
        pairs = zip(layers, removed, strict=True)
        return sum((c.amplification * c.errors[r]) ** 2 for c, r in pairs)

    best = min(
        squares(choice)
        for choice in itertools.product(*(curve.options(1) for curve in layers))
        if sum(c.cost * r for c, r in zip(layers, choice, strict=True)) >= need
    )
    kept = allocate(layers, 0.5, "rms")
    found = squares([c.components - k for c, k in zip(layers, kept, strict=True)])
    assert found == pytest.approx(best)


def test_objective_falls_as_the_budget_grows():
    """More parameters never make the bound larger."""
    layers = curves(3, layers=4, size=11)
    values = [objective(layers, allocate(layers, keep)) for keep in np.linspace(0.2, 1, 17)]
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("method", ["uniform", "certified"])
def test_keeping_everything_removes_nothing(method):
    """Also when the layers' widths are no multiples of ``align``."""
    layers = curves(0)
    assert allocate(layers, 1.0, method, align=4) == [7, 7, 7]


def test_uniform_keeps_the_same_fraction():
    """Exact fractions are met exactly, others rounded toward fewer."""
    layers = [Curve(components=n, cost=1, errors=[0.0] * n) for n in (8, 16, 10)]
    assert allocate(layers, 0.75, "uniform") == [6, 12, 7]
    assert allocate(layers, 0.75, "uniform", align=4) == [4, 12, 4]


def test_a_budget_out_of_reach_is_refused():
    """The message names the limit and three remedies."""
    layers = [Curve(components=10, cost=2, errors=[0.0] * 4)]
    with pytest.raises(ConfigError, match="at most 6 of the 10 units"):
        allocate(layers, 0.5)
    with pytest.raises(ConfigError, match="expected one of certified, rms"):
        allocate(layers, 0.9, "fair")
