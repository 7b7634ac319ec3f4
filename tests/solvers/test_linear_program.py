"""Linear programs against the simplex method of scipy, and every kind that has no solution."""

import math
import statistics

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import bilinear_saddle, linear_program, solve, solve_linear_program
from solvers.infeasibility import no_solution
from solvers.linear_program import relative_errors
from solvers.resolvents import Simplex

RTOL = 1e-8
OBJECTIVE = 1e-6  # what a relative gap of 1e-8 and infeasibilities of 1e-8 leave of an optimum
INF = math.inf


def vector(*entries):
    """Return a float64 vector."""
    return torch.tensor(entries, dtype=torch.float64)


def rows(*entries):
    """Return a float64 matrix."""
    return torch.tensor(entries, dtype=torch.float64)


def planted(seed, num_rows=40, num_columns=100, share=0.4):
    """Return c, A, b and a solution, built from complementary x and slack s of random support."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(num_rows, num_columns, generator=g, dtype=torch.float64)
    x, s = torch.randn(2, num_columns, generator=g, dtype=torch.float64).abs()
    used = torch.rand(num_columns, generator=g, dtype=torch.float64) < share
    x, s = torch.where(used, x, 0.0), torch.where(used, 0.0, s)
    y = torch.randn(num_rows, generator=g, dtype=torch.float64)
    return a.T @ y + s, a, a @ x, x


def random_program(seed, size=12):
    """Return the parts of a feasible, bounded program with all kinds of rows and bounds."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 4, size, generator=g, dtype=torch.float64)
    low = torch.where(normal[2, 0] > 0.5, -INF, -normal[2, 1].abs())
    high = torch.where(normal[2, 2] > 0.5, INF, normal[2, 3].abs())
    inside = torch.rand(size, generator=g, dtype=torch.float64) * 0.1
    a_eq, a_ub = normal[0], normal[1]
    b_eq, b_ub = a_eq @ inside, a_ub @ inside + torch.tensor([0.0, 0.1, 0.5, 2.0]).double()
    # Nonnegative prices of the right signs keep the program bounded.
    reduced = torch.where(torch.isinf(low), torch.where(torch.isinf(high), 0.0, -1.0), 1.0)
    cost = a_eq.T @ normal[0, :, 0] - a_ub.T @ normal[1, :, 0].abs() + reduced
    return cost, (a_eq, b_eq), (a_ub, b_ub), low, high


def reference(cost, equal, at_most, low, high):
    """Return scipy's result."""
    optimize = pytest.importorskip("scipy.optimize")
    return optimize.linprog(
        cost.numpy(), A_eq=equal[0].numpy(), b_eq=equal[1].numpy(), A_ub=at_most[0].numpy(),
        b_ub=at_most[1].numpy(), bounds=torch.stack((low, high), 1).numpy(),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_simplex_method(seed):
    """Oracle: scipy.optimize.linprog: objective, and prices where they are unique."""
    parts = random_program(seed)
    truth = reference(*parts)
    assert truth.status == 0
    cost, equal, at_most, low, high = parts
    problem = linear_program(cost, equal=equal, at_most=at_most, low=low, high=high)
    result = solve_linear_program(problem, rtol=RTOL)
    assert result.status == "optimal", result.message
    assert result.errors.objective == pytest.approx(truth.fun, rel=OBJECTIVE, abs=OBJECTIVE)
    assert result.errors.dual_objective == pytest.approx(truth.fun, rel=OBJECTIVE, abs=OBJECTIVE)
    assert bool((result.x >= low).all() and (result.x <= high).all())
    assert float((equal[0] @ result.x - equal[1]).norm()) <= OBJECTIVE
    assert bool((at_most[0] @ result.x <= at_most[1] + OBJECTIVE).all())
    prices = [*truth.eqlin.marginals, *truth.ineqlin.marginals]
    assert result.prices.tolist() == pytest.approx(prices, abs=1e-4)


def test_reflection_and_primal_weight_pay_as_measured():
    """Oracle: planted optima, and spec 4.1: 2100 plain to 1250 reflected, 1150 to 750 with PID."""
    counts = {}
    for seed in range(3):
        cost, a, b, x = planted(seed, 12, 30)
        problem = linear_program(cost, equal=(a, b))
        for reflection in (0.0, 1.0):
            result = solve_linear_program(
                problem, rtol=RTOL, reflection=reflection, max_iterations=20_000
            )
            assert result.status == "optimal", result.message
            assert result.errors.objective == pytest.approx(float(cost @ x), rel=OBJECTIVE)
            counts.setdefault(reflection, []).append(result.run.iterations)
    assert statistics.median(counts[1.0]) <= 0.8 * statistics.median(counts[0.0])


def test_without_restarts_the_method_crawls():
    """Oracle: spec 4.1: no restart needs over 60000 iterations where restarts need about 1000."""
    cost, a, b, _ = planted(1, 20, 50)
    problem = linear_program(cost, equal=(a, b))
    restarted = solve_linear_program(problem, rtol=RTOL)
    assert restarted.status == "optimal"
    limit = 3 * restarted.run.iterations
    crawling = solve_linear_program(problem, rtol=RTOL, restart=False, max_iterations=limit)
    assert crawling.status == "open"
    assert crawling.errors.largest > 1e3 * restarted.errors.largest


NO_SOLUTION = {
    "negative sum": ("infeasible", {"equal": (rows([1, 1]), vector(-1))}),
    "two equations": ("infeasible", {"equal": (rows([1, 1], [1, 1]), vector(1, 2))}),
    "two inequalities": ("infeasible", {"at_most": (rows([1, 1], [-1, -1]), vector(1, -2))}),
    "empty row": ("infeasible", {"equal": (rows([0, 0], [1, 1]), vector(1, 1))}),
    "beyond the box": ("infeasible", {"equal": (rows([1, 1]), vector(3)), "high": 1.0}),
    "free": ("unbounded", {"equal": (rows([0, 1]), vector(1)), "low": -INF}),
    "no rows": ("unbounded", {"low": -INF}),
    "ray": ("unbounded", {"at_most": (rows([-1, 1]), vector(1)), "low": -INF}),
}


@pytest.mark.parametrize("name", NO_SOLUTION)
def test_programs_without_a_solution_are_recognised(name):
    """Oracle: by inspection; min x_1 + x_2 with each set of constraints."""
    expected, parts = NO_SOLUTION[name]
    result = solve_linear_program(linear_program(vector(1, 1), **parts), max_iterations=5000)
    assert result.status == expected, result.message
    assert result.run.status.name == "NO_SOLUTION_SUSPECTED"
    assert expected in result.message


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_without_a_solution(seed):
    """Oracles: a planted ray along which the cost falls, and a planted Farkas certificate."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(10, 20, generator=g, dtype=torch.float64)
    ray, positive = torch.rand(2, 20, generator=g, dtype=torch.float64)
    falling = a - torch.outer(a @ ray + 0.1, ray) / (ray @ ray)
    program = linear_program(-ray, at_most=(falling, torch.ones(10).double()))
    assert solve_linear_program(program, max_iterations=20_000).status == "unbounded"
    y, b = torch.randn(2, 10, generator=g, dtype=torch.float64)
    separated = a - torch.outer(y, a.T @ y + positive) / (y @ y)
    b = b + y * (1 - b @ y) / (y @ y)
    program = linear_program(positive, equal=(separated, b))
    assert solve_linear_program(program, max_iterations=20_000).status == "infeasible"


def test_solvable_programs_are_never_called_unsolvable():
    """Oracle: a feasible pair exists, so every displacement must fail the test of a ray."""
    for seed in range(4):
        cost, a, b, _ = planted(seed, 6, 15)
        problem = linear_program(cost, equal=(a, b))
        assert solve_linear_program(problem, rtol=1e-6).status == "optimal"
        g = torch.Generator().manual_seed(seed)
        for _ in range(200):
            x = torch.randn(15, generator=g, dtype=torch.float64)
            y = torch.randn(6, generator=g, dtype=torch.float64)
            assert no_solution(problem, (x, y), (a.T @ y, -a @ x)) is None


DEGENERATE = {
    "zero row": (1.0, {"equal": (rows([0, 0], [1, 1]), vector(0, 1))}),
    "repeated rows": (1.0, {"equal": (rows([1, 1], [1, 1], [2, 2]), vector(1, 1, 2))}),
    "fixed variable": (3.0, {"low": vector(1, 1), "high": vector(1, 5)}),
    "only a box": (3.0, {"low": 1.0, "high": 2.0}),
    "free variable": (2.0, {"equal": (rows([1, 2]), vector(2)), "low": vector(-INF, 0)}),
    "redundant inequality": (1.0, {"at_most": (rows([-1, -1], [0, 0]), vector(-1, 5))}),
    "badly scaled": (1e-3, {"equal": (rows([1e3, 1e-4]), vector(1))}),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_programs(name):
    """Oracle: by inspection; min x_1 + 2 x_2, whose optimum each case moves."""
    truth, parts = DEGENERATE[name]
    result = solve_linear_program(linear_program(vector(1, 2), **parts), rtol=RTOL)
    assert result.status == "optimal", result.message
    assert result.errors.objective == pytest.approx(truth, rel=OBJECTIVE)


def test_one_variable_and_no_cost():
    """Oracle: 2 x = 4; any feasible point."""
    result = solve_linear_program(linear_program(vector(1), equal=(rows([2]), vector(4))))
    assert result.x.item() == pytest.approx(2, abs=1e-6)
    assert result.prices.item() == pytest.approx(0.5, abs=1e-6)
    result = solve_linear_program(linear_program(vector(0, 0), equal=(rows([1, 1]), vector(1))))
    assert result.status == "optimal"


def test_float32_reaches_its_precision():
    """Oracle: the vertex (3, 1) of max x + 2 y, and no claim beyond the format."""
    a, b = torch.tensor([[1.0, 1.0], [1.0, 3.0]]), torch.tensor([4.0, 6.0])
    problem = linear_program(torch.tensor([-1.0, -2.0]), at_most=(a, b))
    result = solve_linear_program(problem, rtol=1e-5)
    assert result.status == "optimal", result.message
    assert result.x.dtype == torch.float32
    assert torch.allclose(result.x, torch.tensor([3.0, 1.0]), atol=1e-3)


def test_sparse_rows_take_the_same_path():
    """Oracle: the dense program; the two differ by the estimate of the norm only."""
    cost, a, b, x = planted(1, 8, 20)
    dense = solve_linear_program(linear_program(cost, equal=(a, b)))
    sparse = solve_linear_program(linear_program(cost, equal=(a.to_sparse_coo(), b)))
    assert sparse.status == "optimal", sparse.message
    assert sparse.errors.objective == pytest.approx(float(cost @ x), rel=OBJECTIVE)
    assert sparse.run.iterations <= 2 * dense.run.iterations


def test_other_methods_solve_linear_programs():
    """Oracle: the planted optimum, by forward-reflected-backward splitting."""
    cost, a, b, x = planted(0, 5, 10)
    problem = linear_program(cost, equal=(a, b))
    result = solve_linear_program(problem, method="forb", rtol=1e-4)
    assert result.status == "optimal", result.message
    assert result.errors.objective == pytest.approx(float(cost @ x), rel=1e-3)


def test_errors_vanish_at_the_optimum_only():
    """Oracle: the vertex (3, 1) with prices (-1/2, -1/2); each mistake shows in its own error."""
    a, b = rows([1, 1], [1, 3]), vector(4, 6)
    problem = linear_program(vector(-1, -2), at_most=(a, b))
    best = relative_errors(problem, vector(3, 1), vector(0.5, 0.5))
    assert best.largest == pytest.approx(0, abs=1e-12)
    assert best.objective == best.dual_objective == pytest.approx(-5)
    outside = relative_errors(problem, vector(4, 1), vector(0.5, 0.5))
    assert outside.primal == pytest.approx(math.sqrt(2) / (1 + math.sqrt(52)))
    unpriced = relative_errors(problem, vector(3, 1), vector(0, 0))
    assert unpriced.dual == pytest.approx(math.sqrt(5) / (1 + math.sqrt(5)))
    slack = relative_errors(problem, vector(0, 0), vector(0.5, 0.5))
    assert (slack.primal, slack.dual) == (0, pytest.approx(0, abs=1e-12))
    assert slack.gap == pytest.approx(5 / 6)


def test_an_exhausted_budget_leaves_the_program_open():
    """Oracle: the status of the run, and errors above the tolerance."""
    cost, a, b, _ = planted(0, 10, 20)
    result = solve_linear_program(linear_program(cost, equal=(a, b)), max_iterations=20)
    assert result.status == "open"
    assert result.run.status.name == "MAX_ITERATIONS"
    assert result.errors.largest > RTOL


def test_impossible_programs_are_refused():
    """Each mistake is named."""
    with pytest.raises(ShapeError, match="equal"):
        linear_program(vector(1, 1), equal=(rows([1, 1]), vector(1, 1)))
    with pytest.raises(ShapeError, match="cost"):
        linear_program(torch.zeros(0))
    with pytest.raises(ConfigError, match="low <= high"):
        linear_program(vector(1, 1), low=vector(0, 2), high=1.0)
    with pytest.raises(ConfigError, match="finite"):
        linear_program(vector(1, math.nan))
    game = bilinear_saddle(rows([1.0]), primal=Simplex(), dual=Simplex())
    with pytest.raises(ConfigError, match="boxes on both sides"):
        solve_linear_program(game)
    with pytest.raises(ConfigError, match="rtol"):
        solve_linear_program(linear_program(vector(1)), rtol=-1.0)
    assert solve(linear_program(vector(1), high=1.0), atol=1e-6).converged
