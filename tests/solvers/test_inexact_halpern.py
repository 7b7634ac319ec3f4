"""Algorithm 2 and its unanchored baseline: solutions, outer counts, certificates, edges."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import FiniteSumInclusion, Inclusion, Oracle, Status, bilinear_sum, make_solver, solve

F64 = torch.float64
DISTANCE = 5.0
SMALLEST = math.sin(math.pi / 26) / math.cos(math.pi / 13)  # singular value of S, half = 6
LAW_ROOM = 0.15  # spec 7.1: the outer count is D / (eta eps) within this ratio
SAMPLED = ("inexact_halpern", "vr_extragradient")


def skew_sum(num=64, half=6, seed=0, **changes):
    """F_i(z) = (S + R_i) z + c: S skew from a bidiagonal matrix, R_i skew with mean zero."""
    g = torch.Generator().manual_seed(seed)
    a = torch.eye(half, dtype=F64) - torch.diag(torch.ones(half - 1, dtype=F64), -1)
    a /= torch.linalg.matrix_norm(a, 2)
    s = torch.zeros(2 * half, 2 * half, dtype=F64)
    s[:half, half:], s[half:, :half] = a, -a.T
    r = torch.randn(num, 2 * half, 2 * half, generator=g, dtype=F64)
    r = (r - r.mT) * 0.04
    m = s + r - r.mean(0)
    solution = torch.randn(2 * half, generator=g, dtype=F64)
    solution *= DISTANCE / solution.norm()
    c = -s @ solution
    settings = {
        "components": lambda z, i, w: w @ (m[i] @ z) + w.sum() * c,
        "num_components": num,
        "start": torch.zeros(2 * half, dtype=F64),
        "lipschitz_bound": 1.0,
        "mean_square_lipschitz": math.sqrt(float(torch.linalg.eigvalsh((m.mT @ m).mean(0))[-1])),
        "cocoercive": False,
        "mean": lambda z: s @ z + c,
    }
    return FiniteSumInclusion(**(settings | changes)), solution


def game(size=6, seed=0):
    """A matrix game with uniform optimal play and its gap; simplices as resolvent."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=F64)
    a = a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()

    start = torch.zeros(2 * size, dtype=F64)
    start[0] = start[size] = 1.0
    problem = bilinear_sum(a, start=start, resolvent=_simplices)
    return problem, lambda z: float((a @ z[:size]).max() - (a.T @ z[size:]).min())


def _simplices(z, step):
    """Project both halves at once, by sorting."""
    rows = z.view(2, -1)
    ordered, _ = rows.sort(descending=True)
    excess = ordered.cumsum(1) - 1
    counts = torch.arange(1, rows.shape[1] + 1, dtype=z.dtype)
    active = (ordered * counts > excess).sum(1, keepdim=True)
    return (rows - excess.gather(1, active - 1) / active).clamp_min(0).view(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"implicit": False},
        {"inner": "certified"},
        {"inner": "certified", "reflect": True},
        {"batch": 4},
        {"sampling": "uniform"},
        {"step_scale": 0.5},
    ],
    ids=str,
)
def test_finds_the_solution(options):
    """Oracle: the planted solution of a linear system, |u - u*| <= residual / sigma_min."""
    problem, solution = skew_sum()
    if options.get("sampling") == "uniform":
        constants = torch.full((64,), problem.mean_square_lipschitz, dtype=F64)
        problem, solution = skew_sum(component_lipschitz=constants)
    result = solve(problem, "inexact_halpern", atol=1e-3, **options)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) <= result.residual / SMALLEST
    assert result.verify(problem) == pytest.approx(result.residual, rel=1e-9)


def test_the_baseline_finds_the_solution():
    """Oracle: the planted solution of a linear system, |u - u*| <= residual / sigma_min."""
    problem, solution = skew_sum()
    result = solve(problem, "vr_extragradient", atol=1e-3)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) <= result.residual / SMALLEST


@pytest.mark.parametrize("method", SAMPLED)
def test_solves_a_matrix_game(method):
    """Oracle: the duality gap of the strategies; the residual times the diameter bounds it."""
    problem, gap = game()
    result = solve(problem, method, atol=1e-2)
    assert result.converged, result.message
    diameter = 2.0
    assert gap(result.value) <= result.residual * diameter + 1e-9
    assert result.verify(problem) == pytest.approx(result.residual, rel=1e-6)


def test_certified_inner_loops_solve_a_matrix_game():
    """Oracle: the duality gap (spec 8, open point 3)."""
    problem, gap = game()
    result = solve(problem, "inexact_halpern", inner="certified", atol=1e-2)
    assert result.converged, result.message
    assert gap(result.value) <= result.residual * 2


@pytest.mark.parametrize(
    ("num", "batch", "outer"), [(64, 1, 24), (256, 1, 24), (256, 4, 24), (1024, 64, 60)]
)
def test_outer_count_follows_the_law(num, batch, outer):
    """Oracle: K = D / (eta eps), eta = sqrt(N/b) / L_b, inner problems solved accurately.

    The law is asymptotic; the shorter eta is, the later it holds.
    """
    problem, _ = skew_sum(num)
    solver = make_solver(
        "inexact_halpern", batch=batch, restart_factor=0.0, inner_epochs=1.0, implicit=False
    )
    oracle = Oracle(problem)
    state = solver.init(oracle, problem.start)
    eta = solver.proximal(num, state).eta
    tolerance = DISTANCE / eta / outer
    count = 0
    while state.residual > tolerance:
        state, count = solver.step(oracle, state), count + 1
    assert count == pytest.approx(outer, rel=LAW_ROOM)
    if batch == 1:
        assert eta == pytest.approx(math.sqrt(num) / problem.mean_square_lipschitz)


def test_calls_beat_the_deterministic_methods_here():
    """Oracle: the acceptance line at N = 64, spec 4.3, also in tests/bench."""
    problem, _ = skew_sum(half=12)
    calls = {
        name: solve(problem, name, atol=1e-2, max_calls=10**5).oracle_calls
        for name in ("inexact_halpern", "vr_extragradient", "feg", "extragradient")
    }
    assert calls["inexact_halpern"] == min(calls.values())


@pytest.mark.parametrize("method", SAMPLED)
def test_every_state_is_exact(method):
    """Oracle: the residual recomputed from the problem at each state that the loop sees."""
    problem, _ = game(3)

    def check(state, oracle):
        assert state.exact
        value = problem.full(state.point) + state.normal
        assert float(value.norm()) == pytest.approx(state.residual, rel=1e-9)

    assert solve(problem, method, atol=1e-2, callback=check).converged


@pytest.mark.parametrize("method", SAMPLED)
def test_the_same_seed_gives_the_same_run_and_another_seed_another_one(method):
    """Oracle: equality of every bit of the history."""
    problem, _ = skew_sum()
    runs = [solve(problem, method, atol=0.1, seed=seed) for seed in (3, 3, 4)]
    assert runs[0].trace == runs[1].trace
    assert torch.equal(runs[0].value, runs[1].value)
    assert runs[0].trace != runs[2].trace


def test_calls_are_counted():
    """Oracle: counters inside the components and the mean; snapshots reuse the last value."""
    counts = {"full": 0, "drawn": 0}
    plain, _ = skew_sum()

    def components(z, index, weight):
        counts["drawn"] += len(index)
        return plain.components(z, index, weight)

    def mean(z):
        counts["full"] += 1
        return plain.mean(z)

    problem, _ = skew_sum(components=components, mean=mean)
    result = solve(problem, "inexact_halpern", atol=1e-3)
    assert (result.full_evals, result.component_evals) == (counts["full"], counts["drawn"])


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("method", SAMPLED)
def test_sums_of_few_components(method, num):
    """Oracle: the planted solution."""
    problem, solution = skew_sum(num, half=2)
    result = solve(problem, method, atol=1e-5)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) < 1e-3


@pytest.mark.parametrize("method", SAMPLED)
@pytest.mark.parametrize("resolvent", [None, lambda z, step: z.clamp(-9.0, 9.0)])
def test_one_component_leaves_nothing_to_sample(method, resolvent):
    """Oracle: the deterministic relative takes the same calls to the same point."""
    problem, _ = skew_sum(1, half=2, resolvent=resolvent)
    plain = Inclusion(
        operator=problem.full,
        start=problem.start,
        resolvent=resolvent,
        lipschitz_bound=1.0,
        cocoercive=False,
    )
    relative = "feg" if resolvent is None else "eag"
    relative = relative if method == "inexact_halpern" else "extragradient"
    expected = solve(plain, relative, atol=1e-3)
    for each in (problem, plain):
        result = solve(each, method, atol=1e-3)
        assert result.converged
        assert "nothing to sample" in result.message
        assert torch.equal(result.value, expected.value)


@pytest.mark.parametrize("method", SAMPLED)
def test_constants_ten_times_too_small_are_raised(method):
    """Oracle: the planted solution, finite, with a constant that owns up to being raised."""
    problem, solution = skew_sum(lipschitz_bound=0.1, mean_square_lipschitz=0.1)
    result = solve(problem, method, atol=1e-2)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) <= result.residual / SMALLEST
    assert result.lipschitz > 0.1
    assert result.lipschitz_source == "backtracked"


@pytest.mark.parametrize("method", SAMPLED)
def test_unknown_constants_are_estimated(method):
    """Oracle: the planted solution."""
    problem, solution = skew_sum(lipschitz_bound=None, mean_square_lipschitz=None)
    result = solve(problem, method, atol=1e-2)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) <= result.residual / SMALLEST
    assert result.lipschitz_source == "backtracked"


@pytest.mark.parametrize("method", SAMPLED)
def test_constant_operators_do_not_divide_by_zero(method):
    """Oracle: F = 0 over a box is solved by the projected start."""
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: 0 * z,
        num_components=9,
        start=torch.tensor([3.0, -1.0], dtype=F64),
        resolvent=lambda z, step: z.clamp(-2.0, 2.0),
        lipschitz_bound=0.0,
        mean_square_lipschitz=0.0,
    )
    result = solve(problem, method, atol=1e-9)
    assert result.converged
    assert bool((result.value.abs() <= 2).all())


@pytest.mark.parametrize("method", SAMPLED)
def test_not_monotone_is_found(method):
    """Oracle: F(u) = -u."""
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: -weight.sum() * z,
        num_components=9,
        start=torch.ones(3, dtype=F64),
        mean_square_lipschitz=1.0,
    )
    assert solve(problem, method, max_iterations=50).status is Status.NOT_MONOTONE


@pytest.mark.parametrize("method", SAMPLED)
def test_components_that_are_not_finite_end_the_run(method):
    """Oracle: a status that says so, and the best point before."""
    plain, _ = skew_sum(9, half=2)

    def components(z, index, weight):
        value = plain.components(z, index, weight)
        return value * math.nan if z[0] > 0.3 else value

    problem, _ = skew_sum(9, half=2, components=components, mean=None)
    result = solve(problem, method, atol=1e-9, max_iterations=500)
    assert result.status in (Status.NONFINITE, Status.DIVERGED)
    assert bool(torch.isfinite(result.value).all())
    assert result.verify(problem) == pytest.approx(result.residual)


@pytest.mark.parametrize("method", SAMPLED)
def test_keeps_single_precision(method):
    """Oracle: the dtype of the start; the residual is recomputed in float64."""
    double, _ = skew_sum(16, half=2)

    def components(z, index, weight):
        return double.components(z.double(), index, weight.double()).to(z.dtype)

    start = double.start.float()
    problem, _ = skew_sum(16, half=2, components=components, start=start, mean=None)
    result = solve(problem, method, atol=1e-3)
    assert result.converged, result.message
    assert result.value.dtype == torch.float32


def test_an_inner_loop_that_cannot_reach_its_accuracy_stalls():
    """Oracle: an accuracy below rounding can never be certified; the point stays finite."""
    problem, _ = skew_sum(8, half=2)
    solver = {"inner": "certified", "accuracy": 1e-30}
    result = solve(problem, "inexact_halpern", atol=1e-12, **solver)
    assert result.status is Status.STALLED
    assert "inner" in result.message
    assert bool(torch.isfinite(result.value).all())


def test_the_anchored_residual_costs_more():
    """Oracle: table 4.3 of the spec, 1.5 times or more at the anchored iterate."""
    problem, _ = skew_sum()
    options = {"restart_factor": 0.0, "inner_epochs": 1.0, "atol": 5e-2}
    at_resolvent = solve(problem, "inexact_halpern", **options)
    assert at_resolvent.converged
    limit = 3 * at_resolvent.oracle_calls // 2
    anchored = solve(problem, "inexact_halpern", residual_at="anchored", max_calls=limit, **options)
    assert anchored.status is Status.MAX_CALLS


def test_the_scripts_parameters_diverge_off_their_instance():
    """Oracle: table 4.3 of the spec, last row; the loop then halves the steps until they hold."""
    problem, _ = skew_sum(256)
    result = solve(problem, "inexact_halpern", authors_compat=True, atol=1e-1, max_iterations=300)
    assert result.restarts > 0
    assert result.lipschitz > problem.mean_square_lipschitz
    assert math.isfinite(result.residual)


def test_start_at_the_solution_costs_one_evaluation():
    """Oracle: the contract of spec 7.2."""
    problem, solution = skew_sum()
    for method in SAMPLED:
        result = solve(problem, method, start=solution, atol=1e-10)
        assert result.converged
        assert result.iterations == 0
        assert result.full_evals == 1
        assert result.component_evals == 0


def test_warm_start_continues_from_the_point():
    """Oracle: fewer calls than from scratch to the same tolerance."""
    problem, _ = skew_sum()
    first = solve(problem, "inexact_halpern", atol=1e-2)
    warm = solve(problem, "inexact_halpern", atol=1e-3, warm_start=first)
    cold = solve(problem, "inexact_halpern", atol=1e-3)
    assert warm.converged
    assert warm.oracle_calls < cold.oracle_calls


def test_tuples_are_points_too():
    """Oracle: the packed problem, bit for bit."""
    packed, _ = skew_sum()

    def components(z, index, weight):
        return packed.components(torch.cat(z), index, weight).split(6)

    start = tuple(packed.start.split(6))
    pairs, _ = skew_sum(components=components, start=start, mean=None)
    summed, _ = skew_sum(mean=None)
    result = solve(pairs, "inexact_halpern", atol=1e-2)
    expected = solve(summed, "inexact_halpern", atol=1e-2)
    assert isinstance(result.value, tuple)
    assert torch.equal(torch.cat(result.value), expected.value)


@pytest.mark.parametrize(
    "options",
    [
        {"restart_factor": 1.0},
        {"inner": "guess"},
        {"inner_epochs": 0.0},
        {"accuracy": -1.0},
        {"batch": 0},
        {"outer_scale": math.nan},
        {"sampling": "rare"},
    ],
    ids=str,
)
def test_refuses_impossible_settings(options):
    """Ratios, modes, lengths and laws outside their ranges."""
    with pytest.raises(ConfigError):
        make_solver("inexact_halpern", **options)
