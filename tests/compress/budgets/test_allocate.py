"""Sharing one budget among layers."""

import dataclasses
import itertools

import numpy as np
import pytest

from common.errors import ConfigError
from compress.budgets import knapsack
from compress.budgets.allocate import ALLOCATORS, Curve, allocate, needed, objective

ROUNDING = 1e-9
"""Relative; sums of a few dozen float64 numbers."""
KEEPS = [0.9, 0.6, 0.35]


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


def tabulated(seed: int, layers: int = 3, size: int = 6, *, whole: bool) -> list[Curve]:
    """Return random curves whose tables have plateaus; of whole numbers or of any."""
    generator = np.random.default_rng(seed)
    found = []
    for curve in curves(seed, layers, size):
        steps = generator.integers(0, 4, size + 1).astype(float)
        steps = steps if whole else steps * generator.random(size + 1)
        found.append(dataclasses.replace(curve, cost=[0.0, *np.cumsum(steps)]))
    return found


def aligned(layers: list[Curve], align: int) -> list[Curve]:
    """Return the same curves with kept numbers that are multiples of ``align``."""
    return [dataclasses.replace(curve, align=align) for curve in layers]


def restricted(seed: int, layers: int = 3) -> list[Curve]:
    """Return random curves of which all but the first admit few kept numbers only."""
    found = curves(seed, layers)
    sets = [None, frozenset({1, 2, 4}), frozenset({3, 5, 6})]
    pairs = zip(found, itertools.cycle(sets), strict=False)
    return [dataclasses.replace(curve, allowed=allowed) for curve, allowed in pairs]


INSTANCES = {
    "costs": curves,
    "whole_tables": lambda seed: tabulated(seed, whole=True),
    "float_tables": lambda seed: tabulated(seed, whole=False),
    "allowed_sets": restricted,
}


def stays(layers: list[Curve], kept: list[int]) -> float:
    """Return the units of what is kept."""
    removed = [np.array(c.components - k) for c, k in zip(layers, kept, strict=True)]
    return sum(c.total - float(c.freed(r)) for c, r in zip(layers, removed, strict=True))


def total(layers: list[Curve]) -> float:
    """Return the units of everything."""
    return sum(curve.total for curve in layers)


def most(layers: list[Curve]) -> float:
    """Return a fraction that may be removed for sure: a little less than all options permit."""
    fewest = [curve.components - int(curve.options()[-1]) for curve in layers]
    return 0.999 * (1 - stays(layers, fewest) / total(layers))


def all_choices(layers: list[Curve], keep: float) -> list[list[int]]:
    """Return the kept numbers of every admissible choice within the budget."""
    choices = itertools.product(*((c.components - c.options()).tolist() for c in layers))
    limit = keep * total(layers) * (1 + ROUNDING)
    return [list(kept) for kept in choices if stays(layers, list(kept)) <= limit]


def squares(layers: list[Curve], kept: list[int]) -> float:
    """Return the objective of ``rms``."""
    pairs = zip(layers, kept, strict=True)
    return sum((c.amplification * c.errors[c.components - k]) ** 2 for c, k in pairs)


@pytest.mark.parametrize(("method", "loss"), [("certified", objective), ("rms", squares)])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["costs", "whole_tables", "allowed_sets"])
def test_whole_units_are_shared_optimally(name, seed, share, method, loss):
    """Oracle: all combinations; curves that are not convex, plateaus, sets of kept numbers."""
    layers = INSTANCES[name](seed)
    keep = 1 - share * most(layers)
    best = min(loss(layers, kept) for kept in all_choices(layers, keep))
    assert loss(layers, allocate(layers, keep, method)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", KEEPS)
def test_alignment_is_respected_at_the_optimum(seed, keep):
    """Oracle: all combinations of even kept numbers."""
    layers = aligned(curves(seed), 2)
    kept = allocate(layers, keep)
    assert all(k % 2 == 0 or k == 7 for k in kept)
    best = min(objective(layers, choice) for choice in all_choices(layers, keep))
    assert objective(layers, kept) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(12))
def test_amounts_of_no_common_unit_are_shared_almost_optimally(seed):
    """Oracle: the optimum of a budget smaller by what the coarse units may swallow."""
    layers = tabulated(seed, whole=False)
    keep = 1 - 0.5 * most(layers)
    swallowed = (len(layers) + 1) / knapsack.QUANTA
    best = min(objective(layers, kept) for kept in all_choices(layers, keep))
    tighter = min(objective(layers, kept) for kept in all_choices(layers, keep - swallowed))
    found = objective(layers, allocate(layers, keep))
    assert best * (1 - ROUNDING) <= found <= tighter * (1 + ROUNDING)


@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("name", INSTANCES)
def test_no_method_exceeds_the_budget_or_leaves_the_options(name, method):
    """Oracle: what is kept is counted again, here."""
    for seed, share in itertools.product(range(4), (0.0, 0.03, 0.3, 0.7, 1.0)):
        layers = INSTANCES[name](seed)
        keep = 1 - share * most(layers)
        kept = allocate(layers, keep, method)
        assert stays(layers, kept) <= keep * total(layers) * (1 + ROUNDING)
        for curve, count in zip(layers, kept, strict=True):
            assert curve.components - len(curve.errors) < count <= curve.components
            assert curve.allowed is None or count in {*curve.allowed, curve.components}


@pytest.mark.parametrize("method", ["certified", "rms", "uniform", "global"])
@pytest.mark.parametrize("coarse", [False, True])
def test_losses_fall_as_the_budget_grows(method, coarse, monkeypatch):
    """Every layer of ``uniform`` and ``global`` keeps more, too; also where units are coarse."""
    if coarse:
        monkeypatch.setattr(knapsack, "EXACT_LIMIT", 0)
        monkeypatch.setattr(knapsack, "QUANTA", 50)
    layers = curves(3, layers=4, size=11)
    kept = [allocate(layers, keep, method) for keep in np.linspace(0.2, 1, 17)]
    loss = squares if method == "rms" else objective
    values = [loss(layers, counts) for counts in kept]
    assert all(a >= b for a, b in itertools.pairwise(values))
    if method in ("uniform", "global"):
        assert (np.diff(np.array(kept), axis=0) >= 0).all()


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_uniform_is_never_better_than_certified(seed, coarse, monkeypatch):
    """Both meet the budget; certified minimises the objective, in coarse units as well."""
    if coarse:
        monkeypatch.setattr(knapsack, "EXACT_LIMIT", 0)
        monkeypatch.setattr(knapsack, "QUANTA", 7)
    layers = curves(seed, layers=4, size=11)
    for keep in (0.75, 0.5, 0.25):
        uniform = objective(layers, allocate(layers, keep, "uniform"))
        assert objective(layers, allocate(layers, keep, "certified")) <= uniform + 1e-12


def test_uniform_is_taken_where_both_approximations_are_worse(monkeypatch):
    """By hand: two of each lose 8, free 6; hull and coarse units arrive at one and three, 9."""
    monkeypatch.setattr(knapsack, "EXACT_LIMIT", 0)
    monkeypatch.setattr(knapsack, "QUANTA", 4)
    layers = [
        Curve(components=4, cost=1, errors=[0.0, 0, 4, 7]),
        Curve(components=4, cost=2, errors=[0.0, 2, 4, 9]),
    ]
    assert allocate(layers, 0.5, "certified") == [2, 2]


def test_uniform_keeps_the_same_fraction():
    """By hand: exact fractions are met exactly, others rounded, never over the whole budget."""
    layers = [Curve(components=n, cost=1, errors=[0.0] * n) for n in (8, 16, 10)]
    assert allocate(layers, 0.75, "uniform") == [6, 12, 7]
    assert allocate(aligned(layers, 4), 0.75, "uniform") == [4, 12, 8]


def test_uniform_treats_equal_layers_equally_whatever_their_errors():
    """One count for all of a kind, as an ordinary checkpoint needs; heads must divide 8."""
    wide = aligned(curves(5, layers=4, size=31, convex=True), 4)
    heads = [
        Curve(components=8, cost=5, errors=[0.0] * 8, allowed=frozenset({1, 2, 4, 8}))
        for _ in range(4)
    ]
    for keep in np.linspace(0.2, 1, 9):
        kept = allocate([*wide, *heads], keep, "uniform")
        assert len(set(kept[:4])) == len(set(kept[4:])) == 1
        assert kept[4] in {1, 2, 4, 8}


def test_uniform_goes_on_where_a_layer_has_lost_all_it_may():
    """By hand: 10 of 16 have to go; the first layer gives 2, the second 8 of its 12."""
    layers = [
        Curve(components=4, cost=1, errors=[0.0] * 3),
        Curve(components=12, cost=1, errors=[0.0] * 12),
    ]
    assert allocate(layers, 6 / 16, "uniform") == [2, 4]


def test_global_threshold_compares_scores_in_units_of_their_layer():
    """By hand: scores 1, 2, 9 in both layers, once a thousand times larger; both lose the same."""
    errors = np.sqrt(np.cumsum([0.0, 1, 2, 9]))
    layers = [
        Curve(components=4, cost=1, errors=errors * scale, amplification=scale)
        for scale in (1.0, 1000.0)
    ]
    assert allocate(layers, 0.75, "global") == [3, 3]
    assert allocate(layers, 0.5, "global") == [2, 2]
    assert allocate(layers, 0.5, "certified") == [1, 3]


def test_global_threshold_removes_the_lowest_standardised_scores():
    """Oracle: all scores pooled and sorted; they rise in every layer, costs are equal."""
    generator = np.random.default_rng(7)
    scores = np.sort(generator.lognormal(size=(5, 20)), axis=1)
    curve = np.sqrt(np.concatenate([np.zeros((5, 1)), np.cumsum(scores, 1)], axis=1))
    layers = [Curve(components=21, cost=3, errors=row) for row in curve]
    standard = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    threshold = np.sort(standard, axis=None)[41]
    expected = 21 - (standard <= threshold).sum(1)
    assert allocate(layers, 1 - 42 / 105, "global") == expected.tolist()


def test_global_threshold_keeps_the_order_of_removal():
    """By hand: cheap removals after a dear one wait for it; the other layer's come first."""
    dear_first = Curve(components=5, cost=1, errors=np.sqrt(np.cumsum([0.0, 9, 1, 1, 1])))
    dear_last = Curve(components=5, cost=1, errors=np.sqrt(np.cumsum([0.0, 1, 1, 1, 9])))
    assert allocate([dear_first, dear_last], 0.7, "global") == [5, 2]


def test_global_threshold_counts_what_each_removal_frees():
    """By hand: one dear component with the lowest score frees as much as four cheap ones."""
    cheap = Curve(components=6, cost=1, errors=np.sqrt(np.cumsum([0.0, 2, 3, 4, 5])))
    dear = Curve(components=6, cost=4, errors=np.sqrt(np.cumsum([0.0, 0, 9, 9, 9])))
    assert allocate([cheap, dear], 26 / 30, "global") == [6, 5]


@pytest.mark.parametrize("method", ALLOCATORS)
def test_keeping_everything_removes_nothing(method):
    """Also when the layers' widths are no multiples of ``align``."""
    assert allocate(aligned(curves(0), 4), 1.0, method) == [7, 7, 7]


@pytest.mark.parametrize("method", ALLOCATORS)
def test_layers_with_nothing_to_give_are_left_alone(method):
    """By hand: one layer admits no removal, one frees nothing by it."""
    layers = [
        Curve(components=4, cost=1, errors=[0.0]),
        Curve(components=4, cost=[0.0] * 5, errors=[0.0, 1, 2]),
        Curve(components=4, cost=1, errors=[0.0, 1, 2, 3]),
    ]
    kept = allocate(layers, 0.75, method, total=8)
    assert (kept[0], kept[2]) == (4, 2)
    assert method == "uniform" or kept[1] == 4
    assert allocate(layers[:2], 1.0, method) == [4, 4]


@pytest.mark.parametrize("method", ALLOCATORS)
def test_a_budget_out_of_reach_names_the_fraction_within_reach(method):
    """Oracle: the fraction that the message names is accepted."""
    layers = [Curve(components=10, cost=2, errors=[0.0, 1, 2, 3])]
    with pytest.raises(ConfigError, match=r"keep=0.5: expected at least 0.7, .*min_keep") as info:
        allocate(layers, 0.5, method)
    assert "\n" not in str(info.value)
    assert allocate(layers, 0.7, method) == [7]


def test_an_unknown_method_is_refused():
    """The message lists what there is."""
    with pytest.raises(ConfigError, match="expected one of certified, global, rms, uniform"):
        allocate(curves(0), 0.9, "fair")


def test_needed_rounds_nothing_away():
    """By hand: rounding of the fraction costs no whole unit, and everything may stay."""
    assert needed(10, 0.7) == pytest.approx(3)
    assert needed(10, 0.7) <= 3
    assert needed(10, 1.0) == 0
