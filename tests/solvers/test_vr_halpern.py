"""Algorithm 1: its deterministic limit, its estimator, its exits, its refusals."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import FiniteSumInclusion, Inclusion, Status, make_solver, solve, standard_problem
from solvers.oracle import Oracle

F64 = torch.float64
EXACT = 1e-12
SOLVED = 1e-6


def least_squares(num=64, size=8, seed=0, resolvent=None, dtype=F64, **changes):
    """F_i(u) = a_i (a_i^T u - b_i), consistent, with row norms over two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(num, size, generator=g, dtype=F64)
    a *= torch.logspace(-1, 0.3, num, dtype=F64)[:, None]
    solution = torch.randn(size, generator=g, dtype=F64)
    a, b = a.to(dtype), (a @ solution).to(dtype)

    def components(u, index, weight):
        rows = a[index]
        return (weight * (rows @ u - b[index])) @ rows

    settings = {
        "components": components,
        "num_components": num,
        "start": torch.zeros(size, dtype=dtype),
        "resolvent": resolvent,
        "lipschitz_bound": float(torch.linalg.eigvalsh(a.double().T @ a.double() / num)[-1]),
        "component_lipschitz": a.double().square().sum(1),
        "cocoercive": True,
    }
    return FiniteSumInclusion(**(settings | changes)), solution


def box(z, step):
    """Projection onto a box that cuts off the solution."""
    return z.clamp(-0.5, 0.5)


@pytest.mark.parametrize("resolvent", [None, box])
@pytest.mark.parametrize("parameters", ["practical", "published"])
def test_full_probability_is_the_deterministic_iteration_bit_for_bit(resolvent, parameters):
    """Oracle: anchor-inside Halpern (spec 2.2) written out, every bit of 40 iterates."""
    problem, _ = least_squares(resolvent=resolvent)
    solver = make_solver("vr_halpern", parameters=parameters, probability=1.0, restart_factor=0.0)
    oracle = Oracle(problem)
    state = solver.init(oracle, problem.start)
    anchor = point = state.point
    law, over, shift = ("auto", 1, 2) if parameters == "practical" else ("uniform", 2, 4)
    scale = 1.0 if parameters == "practical" else 0.25
    eta = scale / problem.average_cocoercivity(law)
    for i in range(40):
        weight = over / (i + shift)
        target = weight * anchor + (1 - weight) * point - eta * problem.full(point)
        point = target if resolvent is None else resolvent(target, eta)
        state = solver.step(oracle, state)
        assert torch.equal(state.point, point)
    assert oracle.component_evals == 0
    assert oracle.full_evals == 41


@pytest.mark.parametrize("resolvent", [None, box])
@pytest.mark.parametrize("parameters", ["practical", "published"])
def test_finds_the_solution(resolvent, parameters):
    """Oracle: the planted solution, or projected gradient steps; |u - u*| <= residual / mu."""
    problem, solution = least_squares(resolvent=resolvent)
    exact = solution
    if resolvent is not None:
        exact = problem.start
        for _ in range(3000):
            exact = box(exact - problem.full(exact) / problem.lipschitz_bound, 1.0)
    rtol = 1e-8 if parameters == "practical" else 5e-2
    result = solve(problem, "vr_halpern", parameters=parameters, rtol=rtol, atol=0.0)
    assert result.converged, result.message
    modulus = torch.stack([problem.full(e) - problem.full(0 * e) for e in torch.eye(8, dtype=F64)])
    room = result.residual / float(torch.linalg.eigvalsh(modulus)[0])
    assert float((result.value - exact).norm()) <= room + SOLVED
    assert result.verify(problem) == pytest.approx(result.residual, rel=1e-9)


def test_every_state_is_exact():
    """Oracle: the residual recomputed from the problem at each state that the loop sees."""
    problem, _ = least_squares(resolvent=box)
    seen = []

    def check(state, oracle):
        value = problem.full(state.point) + state.normal
        assert state.exact
        assert float(value.norm()) == pytest.approx(state.residual, rel=1e-9)
        seen.append(state.residual)

    solve(problem, "vr_halpern", rtol=1e-4, atol=0.0, callback=check)
    assert len(seen) > 5


def test_calls_are_full_evaluations_plus_two_per_sampled_component():
    """Oracle: a counter inside the components and inside the mean."""
    counts = {"full": 0, "drawn": 0}
    plain, _ = least_squares()

    def components(u, index, weight):
        counts["drawn"] += len(index)
        return plain.components(u, index, weight)

    def mean(u):
        counts["full"] += 1
        return plain.full(u)

    problem, _ = least_squares(components=components, mean=mean)
    result = solve(problem, "vr_halpern", rtol=1e-3, atol=0.0)
    assert result.full_evals == counts["full"]
    assert result.component_evals == counts["drawn"]
    assert result.oracle_calls == 64 * counts["full"] + counts["drawn"]


def test_the_estimator_is_unbiased_given_the_past():
    """Oracle: enumeration of the sampled difference over all components (spec 2.5)."""
    problem, _ = least_squares()
    g = torch.Generator().manual_seed(1)
    old, new = torch.randn(2, 8, generator=g, dtype=F64)
    (law,) = problem.sampling_laws()
    total = torch.zeros(8, dtype=F64)
    for i in range(64):
        index, weight = torch.tensor([i]), 1 / (64 * law[i : i + 1])
        moved = problem.components(new, index, weight) - problem.components(old, index, weight)
        total += law[i] * moved
    expected = problem.full(new) - problem.full(old)
    assert torch.allclose(total, expected, atol=EXACT, rtol=EXACT)


def test_the_same_seed_gives_the_same_run_and_another_seed_another_one():
    """Oracle: equality of every bit of the history."""
    problem, _ = least_squares()
    runs = [solve(problem, "vr_halpern", rtol=1e-4, atol=0.0, seed=s) for s in (3, 3, 4)]
    assert runs[0].trace == runs[1].trace
    assert torch.equal(runs[0].value, runs[1].value)
    assert runs[0].trace != runs[2].trace


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("parameters", ["practical", "published"])
def test_sums_of_few_components(num, parameters):
    """Oracle: the planted solution; a batch of floor(sqrt(N)) = 1 component."""
    problem, solution = least_squares(num=num, size=1)
    result = solve(problem, "vr_halpern", parameters=parameters, rtol=2e-2, atol=0.0)
    assert result.converged
    assert float((result.value - solution).norm()) < 3e-2 * float(solution.norm())


def test_one_component_leaves_nothing_to_sample():
    """Oracle: restarted Halpern takes the same calls to the same point; also on one operator."""
    problem, _ = least_squares(num=1, size=1)
    plain = Inclusion(
        operator=problem.full,
        start=problem.start,
        lipschitz_bound=problem.lipschitz_bound,
        cocoercive=True,
    )
    expected = solve(plain, "halpern_restarted", rtol=1e-6)
    for each in (problem, plain):
        result = solve(each, "vr_halpern", rtol=1e-6)
        assert result.converged
        assert torch.equal(result.value, expected.value)


def test_refuses_a_problem_that_is_not_cocoercive():
    """Oracle: the message gives the reason and names the method to use."""
    problem, _ = least_squares(cocoercive=False)
    with pytest.raises(ConfigError, match=r"cocoercive on average.*inexact_halpern"):
        solve(problem, "vr_halpern")


def test_finds_out_that_a_skew_operator_is_not_cocoercive():
    """Oracle: F(x, y) = (y, -x) has <F(u) - F(v), u - v> = 0 and no constant helps."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: weight.sum() * (turn @ z),
        num_components=16,
        start=torch.ones(2, dtype=F64),
        lipschitz_bound=1.0,
        mean_square_lipschitz=1.0,
    )
    result = solve(problem, "vr_halpern", max_iterations=100)
    assert result.status is Status.ASSUMPTION_VIOLATED
    assert bool(torch.isfinite(result.value).all())


def test_constants_ten_times_too_small_are_raised():
    """Oracle: the planted solution; the result owns up to the constant."""
    true, solution = least_squares()
    problem, _ = least_squares(
        lipschitz_bound=true.lipschitz_bound / 10,
        component_lipschitz=true.component_lipschitz / 10,
    )
    result = solve(problem, "vr_halpern", rtol=1e-8, atol=0.0)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) < SOLVED
    assert result.lipschitz_source == "backtracked"
    assert result.lipschitz > true.average_cocoercivity() / 10


def test_unknown_constants_are_estimated():
    """Oracle: the planted solution."""
    problem, solution = least_squares(lipschitz_bound=None, component_lipschitz=None)
    result = solve(problem, "vr_halpern", rtol=1e-8, atol=0.0)
    assert result.converged, result.message
    assert float((result.value - solution).norm()) < SOLVED
    assert result.lipschitz_source == "backtracked"


def test_not_monotone_is_found():
    """Oracle: F(u) = -u."""
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: -weight.sum() * z,
        num_components=9,
        start=torch.ones(3, dtype=F64),
        mean_square_lipschitz=1.0,
    )
    result = solve(problem, "vr_halpern", max_iterations=50)
    assert result.status is Status.NOT_MONOTONE
    assert result.residual <= math.sqrt(3) * (1 + EXACT)


def test_start_at_the_solution_costs_one_evaluation():
    """Oracle: the contract of spec 7.2."""
    problem, solution = least_squares()
    result = solve(problem, "vr_halpern", start=solution, atol=1e-10)
    assert result.converged
    assert result.iterations == 0
    assert result.full_evals == 1
    assert result.component_evals == 0


def test_warm_start_continues_from_the_point_and_its_constant():
    """Oracle: fewer calls than from scratch."""
    problem, _ = least_squares()
    first = solve(problem, "vr_halpern", rtol=1e-4, atol=0.0)
    target = first.residual / 10
    warm = solve(problem, "vr_halpern", atol=target, warm_start=first)
    cold = solve(problem, "vr_halpern", atol=target)
    assert warm.converged
    assert cold.converged
    assert warm.oracle_calls < cold.oracle_calls


def test_iterations_do_not_grow_with_the_sum():
    """Oracle: sqrt(N) law (spec 7.1), a quadrupled sum costs about twice the calls."""
    runs = []
    for copies in (1, 4):
        small, _ = least_squares(num=256, size=20)
        num = 256 * copies

        def components(u, index, weight, small=small):
            return small.components(u, index % 256, weight)

        problem = FiniteSumInclusion(
            components=components,
            num_components=num,
            start=small.start,
            lipschitz_bound=small.lipschitz_bound,
            component_lipschitz=small.component_lipschitz.repeat(copies),
            cocoercive=True,
            mean=small.full,
        )
        seeds = range(3)
        calls = [
            solve(problem, "vr_halpern", restart_factor=0.0, rtol=2e-2, atol=0.0, seed=s)
            for s in seeds
        ]
        runs.append(sorted(r.oracle_calls for r in calls)[1])
    assert 1.5 <= runs[1] / runs[0] <= 2.7


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_keeps_the_dtype(dtype):
    """Oracle: the dtype of the start."""
    problem, _ = least_squares(dtype=dtype)
    result = solve(problem, "vr_halpern", rtol=1e-3, atol=0.0)
    assert result.converged
    assert result.value.dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"step_scale": 0.0},
        {"restart_factor": 1.0},
        {"probability": 0.0},
        {"batch": 0},
        {"parameters": "secret"},
    ],
)
def test_refuses_impossible_settings(options):
    """Zero steps, certain restarts, no full evaluation, empty batches, unknown presets."""
    with pytest.raises(ConfigError):
        make_solver("vr_halpern", **options)


def test_published_script_runs_on_the_matrix_game():
    """Oracle: the game of the paper's script, whose rows and columns are two sampled blocks."""
    game = standard_problem("policeman_burglar", size=40).as_sum()
    settings = {"authors_compat": True, "atol": 1e-2, "max_calls": 20_000}
    result = solve(game.problem, "vr_halpern", **settings)
    assert result.converged, result.message
