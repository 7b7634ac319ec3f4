"""Scores and rankings on Gram matrices."""

import itertools

import pytest
import torch

from common.errors import ConfigError
from compress.compensate import compensate, reconstruction_error
from compress.scoring.fidelity import SCORES, output_fidelity, rank, subset_fidelity
from compress.targets import Problem, block_indices

EXACT = 1e-9
"""Relative; float64 linear algebra on well-conditioned 32 x 32 systems."""
NEAR_OPTIMAL = 1.10
"""Greedy elimination against the exhaustive optimum, on the pinned seeds."""


def refit_error(problem: Problem, components: torch.Tensor) -> float:
    """Error of ordinary least squares on some components (oracle: Schur complement)."""
    kept = block_indices(components, problem.unit)
    gone = torch.ones(len(problem.weight_IO), dtype=torch.bool)
    gone[kept] = False
    g = problem.gram_II
    schur = g[gone][:, gone]
    if len(kept):
        schur = schur - g[gone][:, kept] @ torch.linalg.solve(g[kept][:, kept], g[kept][:, gone])
    w = problem.weight_IO[gone]
    return float((w * (schur @ w)).sum())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("unit", [1, 2])
def test_curve_is_the_refitted_error_of_every_prefix(make_problem, score, unit):
    """Oracle: the Schur complement, for each number of removed components."""
    problem, _ = make_problem("low_rank", unit=unit)
    ranking = rank(problem, score, seed=3)
    assert sorted(ranking.order.tolist()) == list(range(problem.components))
    for keep in range(0, problem.components + 1, 3):
        expected = refit_error(problem, ranking.kept(keep))
        found = float(ranking.curve[problem.components - keep])
        assert found == pytest.approx(expected, rel=EXACT, abs=EXACT * problem.energy)


@pytest.mark.parametrize("kind", ["free", "low_rank", "clusters"])
@pytest.mark.parametrize("unit", [1, 2])
def test_obs_picks_the_cheapest_component_first(make_problem, kind, unit):
    """Oracle: refitting without each single component."""
    problem, _ = make_problem(kind, seed=1, unit=unit)
    everything = torch.arange(problem.components)
    costs = [refit_error(problem, everything[everything != c]) for c in range(problem.components)]
    first = rank(problem, "obs").order[0]
    assert int(first) == int(torch.tensor(costs).argmin())


def test_pooled_rounds_match_one_at_a_time(make_problem):
    """Oracle: the same elimination restarted after every single removal."""
    problem, _ = make_problem("clusters", inputs=128, rows=4096)
    pooled = rank(problem, "obs", keep=64)
    left = torch.arange(128)
    for _ in range(64):
        part = Problem(
            gram_II=problem.gram_II[left][:, left],
            weight_IO=compensate(problem, left, "lsq"),
            ridge=0.0,
        )
        left = left[rank(part, "obs", keep=len(left) - 1).kept(len(left) - 1)]
    exact, found = refit_error(problem, left), refit_error(problem, pooled.kept(64))
    assert found <= 1.02 * exact


def test_duplicates_are_never_both_removed(make_problem):
    """Every feature exists twice at different scales: half of them is enough, exactly."""
    problem, _ = make_problem("free", inputs=16)
    scale = torch.linspace(0.5, 2, 16, dtype=torch.float64)
    copies = torch.cat([torch.eye(16, dtype=torch.float64), torch.diag(scale)])
    gram = copies @ problem.gram_II @ copies.T
    weight = torch.cat([problem.weight_IO, problem.weight_IO.flip(0)])
    double = Problem(gram_II=gram, weight_IO=weight, ridge=1e-9)
    ranking = rank(double, "obs", keep=16)
    kept = ranking.kept(16)
    assert sorted((kept % 16).tolist()) == list(range(16))
    new = compensate(double, kept, "lsq")
    assert reconstruction_error(double, kept, new) < 1e-12 * double.energy


@pytest.mark.parametrize("score", [name for name in SCORES if name != "random"])
def test_dead_components_go_first_at_no_cost(make_problem, score):
    """A component that is always 0 contributes nothing, whatever its weights."""
    problem, _ = make_problem("low_rank", ridge=1e-6)
    gram, weight = problem.gram_II.clone(), problem.weight_IO.clone()
    gram[[4, 19]] = 0
    gram[:, [4, 19]] = 0
    weight[[4, 19]] = 100.0
    ranking = rank(Problem(gram_II=gram, weight_IO=weight, ridge=1e-9), score)
    assert set(ranking.order[:2].tolist()) == {4, 19}
    assert float(ranking.curve[2]) < 1e-4 * problem.energy


@pytest.mark.parametrize("score", [name for name in SCORES if name != "random"])
@pytest.mark.parametrize("unit", [1, 2])
def test_permuting_components_permutes_the_order(make_problem, score, unit):
    """The order of neurons carries no meaning."""
    problem, _ = make_problem("low_rank", unit=unit)
    shuffle = torch.randperm(problem.components, generator=torch.Generator().manual_seed(5))
    inputs = block_indices(shuffle, unit)
    moved = Problem(
        gram_II=problem.gram_II[inputs][:, inputs],
        weight_IO=problem.weight_IO[inputs],
        unit=unit,
        ridge=0.0,
    )
    order = rank(problem, score).order
    assert torch.equal(shuffle[rank(moved, score).order], order)


@pytest.mark.parametrize(
    ("score", "invariant"),
    [
        *((name, True) for name in SCORES if name not in ("magnitude", "random")),
        ("magnitude", False),
    ],
)
def test_only_magnitude_depends_on_the_units_of_a_neuron(make_problem, score, invariant):
    """Scaling a neuron by s and its outgoing weights by 1/s changes nothing the layer computes."""
    problem, _ = make_problem("low_rank")
    scale = torch.exp(torch.linspace(-1, 1, 32, dtype=torch.float64))
    other = Problem(
        gram_II=problem.gram_II * torch.outer(scale, scale),
        weight_IO=problem.weight_IO / scale[:, None],
        ridge=0.0,
    )
    same = torch.equal(rank(problem, score).order, rank(other, score).order)
    assert same == invariant


def test_uncorrelated_components_make_all_informed_scores_agree(make_problem):
    """Theorem of the paper: with a diagonal Gram the top singleton scores are optimal."""
    problem, _ = make_problem("free")
    diagonal = Problem(
        gram_II=torch.diag(problem.gram_II.diagonal()), weight_IO=problem.weight_IO, ridge=0.0
    )
    agreeing = ("obs", "greedy", "energy", "singleton", "rowsum", "cholesky", "flap")
    orders = [rank(diagonal, score).order for score in agreeing]
    assert all(torch.equal(order, orders[0]) for order in orders)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("score", ["obs", "greedy"])
def test_eliminations_are_near_the_exhaustive_optimum(make_problem, seed, score):
    """Oracle: all subsets of four out of ten."""
    problem, _ = make_problem("low_rank", seed, inputs=10, outputs=6)
    best = min(
        refit_error(problem, torch.tensor(subset))
        for subset in itertools.combinations(range(10), 4)
    )
    assert refit_error(problem, rank(problem, score).kept(4)) <= NEAR_OPTIMAL * best


@pytest.mark.parametrize("kind", ["low_rank", "clusters"])
@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_quality_gate_obs_then_energy_then_singleton(make_problem, kind, fraction):
    """Held-out error of obs + lsq <= energy + lsq <= singleton + lsq, mean of three seeds."""
    means = {}
    for score in ("obs", "energy", "singleton"):
        errors = []
        for seed in range(3):
            problem, held = make_problem(kind, seed, inputs=64, outputs=32, ridge=1e-6)
            kept = rank(problem, score).kept(round(fraction * 64))
            new = compensate(problem, kept, "lsq")
            errors.append(reconstruction_error(held, kept, new) / held.energy)
        means[score] = sum(errors) / 3
    assert means["obs"] <= means["energy"] <= means["singleton"]


@pytest.mark.parametrize("unit", [1, 2])
def test_fidelity_is_what_a_regression_on_the_kept_inputs_explains(make_problem, unit):
    """Oracle: lstsq on rows with this Gram, for each output and all subsets of six components."""
    problem, _ = make_problem("low_rank", inputs=6 * unit, outputs=5, unit=unit)
    rows = torch.linalg.cholesky(problem.gram_II).T
    target = rows @ problem.weight_IO
    for size in range(7):
        for subset in itertools.combinations(range(6), size):
            chosen = torch.tensor(subset, dtype=torch.int64)
            part = rows[:, block_indices(chosen, unit)]
            residual = target - part @ torch.linalg.lstsq(part, target).solution if size else target
            share = residual.square().sum(0) / target.square().sum(0)
            found = output_fidelity(problem, chosen)
            torch.testing.assert_close(found, 1 - share, rtol=EXACT, atol=EXACT)
            whole = 1 - float(residual.square().sum() / target.square().sum())
            assert subset_fidelity(problem, chosen) == pytest.approx(whole, abs=EXACT)


@pytest.mark.parametrize("kind", ["free", "low_rank", "clusters"])
@pytest.mark.parametrize("unit", [1, 2])
def test_fidelity_grows_from_nothing_to_everything(make_problem, kind, unit):
    """Random nested subsets: 0 at the empty one, 1 at the full one, never falling between."""
    problem, _ = make_problem(kind, seed=2, unit=unit, ridge=1e-2)
    nested = torch.randperm(problem.components, generator=torch.Generator().manual_seed(8))
    shares = torch.stack(
        [output_fidelity(problem, nested[:count]) for count in range(problem.components + 1)]
    )
    assert float(shares[0].abs().max()) == 0.0
    assert bool((shares[-1] == 1).all())
    assert bool((shares.diff(dim=0) >= -EXACT).all())


def test_fidelity_of_outputs_and_layers_without_energy_is_one(make_problem):
    """An output without weights is skipped in the mean of the layer; a silent layer has 1."""
    problem, _ = make_problem("low_rank")
    kept = torch.arange(5)
    weight = torch.cat([problem.weight_IO, torch.zeros(32, 3, dtype=torch.float64)], dim=1)
    wider = Problem(gram_II=problem.gram_II, weight_IO=weight)
    assert bool((output_fidelity(wider, kept)[-3:] == 1).all())
    assert subset_fidelity(wider, kept) == pytest.approx(subset_fidelity(problem, kept))
    silent = Problem(gram_II=torch.zeros_like(problem.gram_II), weight_IO=problem.weight_IO)
    assert subset_fidelity(silent, kept) == 1.0


def test_fidelity_agrees_with_the_curve_of_a_ranking(make_problem):
    """Two ways to the same number: least squares, and sums of elimination costs."""
    problem, _ = make_problem("clusters", seed=5)
    ranking = rank(problem, "obs")
    for keep in (24, 12, 4):
        expected = 1 - float(ranking.curve[32 - keep]) / problem.energy
        found = subset_fidelity(problem, ranking.kept(keep))
        assert found == pytest.approx(expected, abs=EXACT)


def test_random_is_reproducible_and_depends_on_the_seed(make_problem):
    """Same seed, same order."""
    problem, _ = make_problem("free")
    orders = [rank(problem, "random", seed=seed).order.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_ranking_that_stopped_early_says_so(make_problem):
    """Asking for fewer components than were ranked is an error that names the range."""
    problem, _ = make_problem("free")
    ranking = rank(problem, "obs", keep=20)
    assert len(ranking.kept(20)) == 20
    with pytest.raises(ConfigError, match="covers 20 to 32"):
        ranking.kept(19)


def test_unknown_score_lists_the_known_ones(make_problem):
    """The message is the documentation."""
    with pytest.raises(ConfigError, match="expected one of obs, greedy"):
        rank(make_problem("free")[0], "best")


def test_a_gram_that_is_not_one_is_refused():
    """A matrix with a clearly negative eigenvalue cannot be a mean of squares."""
    gram = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    weight = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="not positive semi-definite"):
        rank(Problem(gram_II=gram, weight_IO=weight), "energy")
