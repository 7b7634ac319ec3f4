"""What a budget means, and sharing it among the targets of a model."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from common.errors import ConfigError
from compress.budgets.allocate import ALLOCATORS
from compress.budgets.budget import (
    ROUNDS,
    WARM_UPS,
    WIDTHS,
    Budget,
    Candidate,
    latency_table,
    share,
)
from compress.targets import Target

EXACT = 1e-12
"""Relative; a handful of float64 operations."""


def target(index: int = 0, kind: str = "mlp", components: int = 12, **fields: float) -> Target:
    """Return a target; per component 10 parameters and 20 operations, 40 and 300 for heads."""
    params, flops = (40, 300.0) if kind == "heads" else (10, 20.0)
    unit = 4 if kind == "heads" else 1
    return Target(
        name=f"layers.{index}.{kind}",
        layer=index,
        kind=kind,
        inputs=components * unit,
        unit=unit,
        **{"params": params, "flops": flops, **fields},
    )


def errors(seed: int, count: int) -> list[float]:
    """Return a random error curve for removing up to ``count`` components."""
    return [0.0, *np.cumsum(np.random.default_rng(seed).random(count))]


def model(layers: int = 3) -> list[Candidate]:
    """Return MLPs of 12 neurons and heads in 4 groups, with random errors."""
    found = []
    for index in range(layers):
        for kind, components in (("heads", 4), ("mlp", 12)):
            place = target(index, kind, components)
            curve = errors(2 * index + (kind == "mlp"), components - 1)
            found.append(Candidate(target=place, errors=curve, amplification=1.0 + index))
    return found


def stays(candidates: list[Candidate], kept: dict[str, int], field: str) -> float:
    """Return the parameters or operations that stay."""
    return sum(kept[c.target.name] * getattr(c.target, field) for c in candidates)


def everything(candidates: list[Candidate], field: str) -> float:
    """Return the parameters or operations of all components."""
    return sum(c.target.components * getattr(c.target, field) for c in candidates)


class Clock:
    """A device whose latency is a given function of the kept number; it notes its runs."""

    def __init__(self, latency: Callable[[int], float]) -> None:
        self.latency = latency
        self.runs: list[tuple[str, int]] = []

    def __call__(self, place: Target, kept: int) -> float:
        """Return the seconds of one run."""
        self.runs.append((place.name, kept))
        return self.latency(kept)


@pytest.mark.parametrize("method", ALLOCATORS)
@pytest.mark.parametrize("kind", ["params", "flops"])
def test_budget_holds_for_what_it_counts(kind, method):
    """Oracle: counted again here; heads and MLPs share one budget."""
    candidates = model()
    for keep in (1.0, 0.8, 0.5, 0.3):
        kept = share(candidates, keep, method, budget=Budget(kind=kind))
        assert list(kept) == [candidate.target.name for candidate in candidates]
        limit = keep * everything(candidates, kind)
        assert stays(candidates, kept, kind) <= limit * (1 + EXACT)
        assert stays(candidates, kept, kind) > limit - everything(candidates[:2], kind)


def test_budget_of_the_model_counts_what_is_out_of_scope():
    """By hand: of 1000 parameters 360 are prunable; keeping 0.8 means removing 200 of the 360."""
    candidates = [Candidate(target=target(index), least=2) for index in range(3)]
    budget = Budget(of="model")
    kept = share(candidates, 0.8, budget=budget, model_total=1000)
    assert set(kept.values()) == {5}
    with pytest.raises(ConfigError, match=r"keep=0.5: expected at least 0.7,") as info:
        share(candidates, 0.5, budget=budget, model_total=1000)
    assert "\n" not in str(info.value)
    assert set(share(candidates, 0.7, budget=budget, model_total=1000).values()) == {2}


@pytest.mark.parametrize("method", ALLOCATORS)
def test_heads_with_a_budget_of_their_own_are_shared_apart(method):
    """Oracle: two calls, one for each kind."""
    candidates = model()
    groups = [[c for c in candidates if c.target.kind == kind] for kind in ("mlp", "heads")]
    apart = share(groups[0], 0.5, method) | share(groups[1], 0.75, method)
    assert share(candidates, 0.5, method, keep_heads=0.75) == apart
    only_heads = share(candidates, 1.0, method, keep_heads=0.5)
    assert all(only_heads[c.target.name] == c.target.components for c in groups[0])
    assert share(groups[1], 0.1, method, keep_heads=0.75) == share(groups[1], 0.75, method)


def test_one_budget_goes_where_it_costs_least():
    """By hand: heads without any effect go first, down to their least number."""
    flat = Candidate(target=target(0, "heads", 4), errors=[0.0] * 4)
    steep = Candidate(target=target(0, "mlp"), errors=errors(0, 11))
    kept = share([flat, steep], 160 / 280, "certified")
    assert kept == {"layers.0.heads": 1, "layers.0.mlp": 12}


@pytest.mark.parametrize("method", ALLOCATORS)
def test_limits_of_every_target_are_respected(method):
    """Least numbers, multiples and sets, each with the places it was given to."""
    candidates = [
        Candidate(target=target(0), errors=errors(0, 11), least=6),
        Candidate(target=target(1), errors=errors(1, 11), align=4),
        Candidate(target=target(2), errors=errors(2, 11), allowed=frozenset({3, 9})),
        Candidate(target=target(3), errors=errors(3, 2)),
    ]
    for keep in np.linspace(0.55, 1, 10):
        kept = list(share(candidates, keep, method).values())
        assert kept[0] >= 6
        assert kept[1] % 4 == 0
        assert kept[2] in {3, 9, 12}
        assert kept[3] >= 10


@pytest.mark.parametrize("kind", ["params", "flops", "latency"])
def test_equal_targets_keep_equally_many_under_uniform(kind):
    """As an ordinary checkpoint needs, whose layers have one shape; no errors are looked at."""
    candidates = [
        Candidate(target=target(index, name, size), allowed=allowed)
        for index in range(3)
        for name, size, allowed in (("mlp", 12, None), ("heads", 8, frozenset({1, 2, 4})))
    ]
    noise = np.random.default_rng(0)
    clock = Clock(lambda kept: kept * noise.uniform(0.9, 1.1))
    kept = share(candidates, 0.6, budget=Budget(kind=kind), seconds=clock)
    for name in ("mlp", "heads"):
        assert len({count for key, count in kept.items() if key.endswith(name)}) == 1


def test_latency_table_is_exact_where_latency_is_linear():
    """By hand: 3 s and 1 s per component; nothing kept takes no time."""
    table = latency_table(Candidate(target=target()), Clock(lambda kept: 3.0 + kept))
    expected = [15.0 - (3 + kept) for kept in range(12, 0, -1)]
    assert table[:-1] == pytest.approx(expected)
    assert table[-1] == pytest.approx(15)


def test_latency_is_timed_at_few_admissible_widths():
    """By hand: five of the multiples of 8 from the least one up, warm-ups among the runs."""
    candidate = Candidate(target=target(components=100), least=20, align=8)
    clock = Clock(lambda kept: kept)
    latency_table(candidate, clock)
    widths = {kept for _, kept in clock.runs}
    assert len(widths) == WIDTHS
    assert {24, 100} < widths
    assert all(kept % 8 == 0 or kept == 100 for kept in widths)
    assert len(clock.runs) == WIDTHS * (WARM_UPS + ROUNDS)


def test_latency_that_falls_with_width_frees_nothing():
    """By hand: a slow width makes no wider one look slower, nor itself faster than the full."""
    seconds = {12: 10.0, 9: 8.0, 6: 12.0, 4: 6.0, 1: 7.0}
    candidate = Candidate(target=target(), allowed=frozenset(seconds))
    table = latency_table(candidate, Clock(seconds.__getitem__))
    freed = {kept: table[12 - kept] for kept in seconds}
    assert freed == pytest.approx({12: 0, 9: 0, 6: 0, 4: 3, 1: 3})
    assert all(a <= b for a, b in itertools.pairwise(table))


def test_latency_survives_a_slower_clock_and_interruptions():
    """Oracle: the steady clock; halfway the clock slows to a third, some runs are interrupted."""
    steady = np.array(latency_table(Candidate(target=target()), Clock(lambda kept: 5.0 + kept)))

    def seconds(kept: int) -> float:
        run = len(shaky.runs)
        speed = 1.0 if run < WIDTHS * (WARM_UPS + ROUNDS / 2) else 3.0
        return (5.0 + kept) * speed * (50 if run % (3 * WIDTHS) == 0 else 1)

    shaky = Clock(seconds)
    table = np.array(latency_table(Candidate(target=target()), shaky))
    np.testing.assert_allclose(table / table[-1], steady / steady[-1], rtol=EXACT)


def test_warm_ups_do_not_count():
    """By hand: once warm, most rounds are linear; with the warm-ups, most would not be."""

    def seconds(kept: int) -> float:
        cold = WIDTHS * (WARM_UPS + ROUNDS // 2 - 1)
        return 12.0 if len(clock.runs) <= cold else float(kept)

    clock = Clock(seconds)
    table = latency_table(Candidate(target=target()), clock)
    assert table == pytest.approx([float(removed) for removed in range(13)])


def test_latency_budget_is_met_and_shapes_are_timed_once():
    """Oracle: the true latencies, linear, summed over what is kept."""
    candidates = model(4)
    clock = Clock(lambda kept: 2.0 + kept)
    kept = share(candidates, 0.6, "certified", budget=Budget(kind="latency"), seconds=clock)
    dense = sum(2.0 + c.target.components for c in candidates)
    assert sum(2.0 + count for count in kept.values()) <= 0.6 * dense * (1 + EXACT)
    assert {name for name, _ in clock.runs} == {"layers.0.heads", "layers.0.mlp"}


def test_latency_of_the_model_counts_the_rest():
    """By hand: 36 s of 100 s are prunable; keeping 0.8 means saving 20 s."""
    candidates = [Candidate(target=target(index)) for index in range(3)]
    budget = Budget(kind="latency", of="model")
    clock = Clock(float)
    kept = share(candidates, 0.8, budget=budget, model_total=100.0, seconds=clock)
    assert set(kept.values()) == {5}


def test_stairs_of_latency_are_not_climbed_down_in_vain():
    """By hand: time falls at 8 and 4 only; certified stops where the next step begins."""
    candidate = Candidate(target=target(), errors=errors(0, 11), allowed=frozenset(range(4, 13)))
    stairs = Clock(lambda kept: 4.0 * -(-kept // 4))
    budget = Budget(kind="latency")
    kept = share([candidate], 0.7, "certified", budget=budget, seconds=stairs)
    assert kept == {"layers.0.mlp": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_heads": 0.5}, "keep_heads=0.5: expected heads among .* remove it"),
        ({"method": "fair"}, "allocation='fair': expected one of certified, global"),
    ],
    ids=["heads", "method"],
)
def test_impossible_wishes_are_refused_in_one_line(arguments, message):
    """The message names the setting and the remedy."""
    candidates = [Candidate(target=target(), errors=errors(0, 11))]
    with pytest.raises(ConfigError, match=message) as info:
        share(candidates, 0.5, **arguments)
    assert "\n" not in str(info.value)


def test_two_fractions_of_one_model_are_refused():
    """The message names both remedies; heads may be left alone, as by hand."""
    budget = Budget(of="model")
    with pytest.raises(ConfigError, match=r"keep_heads=0.5: .* change it, or set .*of=prunable"):
        share(model(), 0.5, budget=budget, keep_heads=0.5, model_total=1000)
    kept = share(model(), 0.82, budget=budget, keep_heads=1.0, model_total=1000)
    assert list(kept.values()) == [4, 6, 4, 6, 4, 6]


def test_heads_out_of_reach_are_called_by_their_setting():
    """By hand: one of four groups stays, so a quarter is the least."""
    with pytest.raises(ConfigError, match=r"compress.keep_heads=0.2: expected at least 0.25,"):
        share(model(), 0.5, keep_heads=0.2)


def test_a_clock_that_stands_still_is_refused():
    """The message names the place and another kind of budget."""
    with pytest.raises(ConfigError, match=r"layers.0.mlp: a timing of 0.0 s, .*kind=flops"):
        latency_table(Candidate(target=target()), Clock(lambda kept: 0.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "bytes"}, "compress.budget.kind='bytes': expected one of params, flops, lat"),
        ({"of": "layer"}, "compress.budget.of='layer': expected one of prunable, model"),
    ],
    ids=["kind", "of"],
)
def test_unknown_budgets_are_refused(fields, message):
    """The message lists what there is."""
    with pytest.raises(ConfigError, match=message):
        Budget(**fields)
