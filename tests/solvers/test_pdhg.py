"""Restarted reflected Halpern PDHG on games and saddle points with known answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from solvers import (
    Inclusion,
    Status,
    bilinear_saddle,
    iterate,
    make_solver,
    matrix_game,
    solve,
)
from solvers.games import policeman_burglar
from solvers.primal_weight import PrimalWeight
from solvers.resolvents import Box, L2Ball, project_simplex

EXACT = 1e-10
LEVELS = (5e-2, 2e-2, 1e-2, 5e-3)
# Epochs of spec 4.4 on the policeman and burglar game: r2HPDHG and FoRB, centred.
SPEC_PDHG, SPEC_FORB = (8, 52, 85, 193), (18, 117, 190, 428)
PLAIN = {"adapt_weight": False, "primal_weight": 1.0}


def burglar(size=200):
    """Return the policeman and burglar payoff with the draws of the paper's scripts."""
    return policeman_burglar(torch.tensor(np.abs(np.random.RandomState(1).randn(size))))


def low_rank(size, rank=3, seed=0):
    """Return the centred low-rank game of spec 4.4 with norm sqrt(n)."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, rank, generator=g, dtype=torch.float64)
    a = a @ torch.randn(rank, size, generator=g, dtype=torch.float64)
    a = a + 0.01 * a.abs().mean() * torch.randn(size, size, generator=g, dtype=torch.float64)
    a = a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()
    return a * (math.sqrt(size) / float(torch.linalg.matrix_norm(a, 2)))


def natural_residual(a, x, y):
    """Return ``|z - P(z - F(z))|`` of a game, the measure of the paper."""
    moved = (x - project_simplex(x - a.T @ y), y - project_simplex(y + a @ x))
    return float(torch.cat(moved).norm())


def epochs(problem, a, method, levels, limit=500, **options):
    """Return the full evaluations until the natural residual meets each level."""
    left, found = list(levels), []

    def callback(state, oracle):
        x, y = oracle.structure.unpack(state.point)
        residual = natural_residual(a, x, y)
        while left and residual <= left[0]:
            found.append(oracle.full_evals)
            left.pop(0)
        return not left

    solver = make_solver(method, **options)
    iterate(problem, solver, atol=0, max_iterations=limit, callback=callback, check=False)
    return found


def written_out(a, c, b, steps, rho):
    """Return the last PDHG point of the recipe of spec 2.8, without restarts, over x >= 0."""
    x, y = torch.zeros_like(c), torch.zeros_like(b)
    anchor, eta = (x, y), 0.998 / float(torch.linalg.matrix_norm(a, 2))
    for j in range(steps):
        new_x = (x - eta * (c + a.T @ y)).clamp_min(0)
        new_y = y + eta * (a @ (2 * new_x - x) - b)
        share = (j + 1) / (j + 2)
        x, y = (
            share * ((1 + rho) * new - rho * old) + (1 - share) * first
            for new, old, first in zip((new_x, new_y), (x, y), anchor, strict=True)
        )
    return new_x, new_y


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_iteration_is_the_written_out_recipe(rho):
    """Oracle: the formulas of spec 2.8 with four products per iteration, step by step."""
    g = torch.Generator().manual_seed(0)
    a, c, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((4, 7), (7,), (4,)))
    problem = bilinear_saddle(a, cost=c, offset=b, primal=Box(0.0))
    states = []
    result = solve(
        problem, "pdhg", atol=0.0, max_iterations=30, restart=False, diagonal=False,
        primal_weight=1.0, reflection=rho, callback=lambda state, _: states.append(state),
        check=False,
    )  # fmt: skip
    assert result.status is Status.MAX_ITERATIONS
    for steps in (1, 7, 30):
        assert torch.allclose(
            states[steps].point, torch.cat(written_out(a, c, b, steps, rho)), atol=EXACT
        )


@pytest.mark.parametrize(("rho", "constant"), [(0.0, 2.0), (1.0, 1.0)])
def test_fixed_point_error_meets_the_halpern_rate(rho, constant):
    """Oracle: |z - T z|_M <= constant |z_0 - z*|_M / (k + 1) at every k, spec 2.1 and 2.3."""
    g = torch.Generator().manual_seed(1)
    a = torch.randn(8, 8, generator=g, dtype=torch.float64)
    truth = torch.randn(16, generator=g, dtype=torch.float64)
    x, y = truth.split(8)
    problem = bilinear_saddle(a, cost=-a.T @ y, offset=a @ x)
    eta = 0.998 / float(torch.linalg.matrix_norm(a, 2))

    def length(v):
        return math.sqrt(float(v @ v) / eta - 2 * float(v[8:] @ (a @ v[:8])))

    seen = [problem.start[0].new_zeros(16)]
    errors = []

    def callback(state, oracle):
        errors.append(length(seen[-1] - state.point))
        seen.append(state.iterate)

    options = {"restart": False, "diagonal": False, "primal_weight": 1.0, "reflection": rho}
    solve(problem, "pdhg", atol=0.0, max_iterations=300, callback=callback, check=False, **options)
    distance = length(truth)
    assert len(errors) == 301
    for k, error in enumerate(errors[1:]):
        assert error <= constant * distance / (k + 1) + EXACT


def test_policeman_burglar_column_of_the_specification():
    """Oracle: the measured epochs of spec 4.4 within 20 % (ours count the start as well)."""
    a = burglar()
    game = matrix_game(a)
    found = epochs(game, a, "pdhg", LEVELS, **PLAIN)
    assert len(found) == len(LEVELS)
    for mine, spec in zip(found, SPEC_PDHG, strict=True):
        assert abs(mine - 1 - spec) <= 0.2 * spec
    for mine, spec in zip(epochs(game, a, "forb", LEVELS[:2]), SPEC_FORB, strict=False):
        assert abs(mine - 1 - spec) <= 0.2 * spec


def test_adapting_the_primal_weight_pays_on_the_same_game():
    """Oracle: the run with a fixed weight needs 783 epochs to 1e-3 (spec 4.4)."""
    a = burglar()
    found = epochs(matrix_game(a), a, "pdhg", (1e-3,), limit=300)
    assert found
    assert found[0] <= 300


@pytest.mark.parametrize("size", [100, 400])
def test_low_rank_games_take_eleven_epochs(size):
    """Oracle: spec 4.4: 11 epochs at a check every 10, and fewer than the other methods."""
    a = low_rank(size)
    start = torch.rand(2, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    game = replace(matrix_game(a), start=tuple(play / play.sum() for play in start))
    for options in (PLAIN, {}):
        mine = epochs(game, a, "pdhg", (1e-2, 4e-3), **options)
        assert 2 <= mine[-1] <= 12
    for method in ("forb", "extragradient", "eag"):
        other = epochs(game, a, method, (4e-3,), limit=60)
        assert not other or other[0] > 1.5 * mine[-1]


def test_result_reports_residual_gap_and_evaluations():
    """Oracles: Result.verify, the closed-form gap of a game, a counter in the operator."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(20, 30, generator=g, dtype=torch.float64)
    products = []
    maps = (
        lambda x: products.append("A") or a @ x,
        lambda y: products.append("T") or y @ a,
    )
    game = matrix_game(a)
    result = solve(game, "pdhg", atol=1e-7)
    assert result.converged, result.message
    assert result.verify(game) == pytest.approx(result.residual, rel=1e-6)
    x, y = result.value
    gap = float((a @ x).max() - (a.T @ y).min())
    assert 0 <= gap <= result.gap_bound
    assert result.gap_bound == pytest.approx(2 * result.residual)
    assert game.duality_gap(result.value) == pytest.approx(gap, abs=1e-12)
    counted = bilinear_saddle(
        maps, cost=a[0], offset=a[:, 0], primal=L2Ball(), dual=L2Ball(), lipschitz_bound=9.0
    )
    result = solve(counted, "pdhg", atol=1e-3, check=False)
    assert products.count("A") == products.count("T") == result.full_evals
    assert result.full_evals == result.iterations + 1


def test_game_value_lies_in_the_certified_interval():
    """Oracle: the value of a random 20x30 game by scipy's simplex method."""
    optimize = pytest.importorskip("scipy.optimize")
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    # min v with A x <= v, x a strategy.
    rows = np.hstack((a.numpy(), -np.ones((20, 1))))
    truth = optimize.linprog(
        [0.0] * 30 + [1.0], A_ub=rows, b_ub=np.zeros(20), A_eq=[[1.0] * 30 + [0.0]], b_eq=[1.0],
        bounds=[(0, None)] * 30 + [(None, None)],
    ).fun  # fmt: skip
    for game in (matrix_game(a), matrix_game(a, centered=False)):
        result = solve(game, "pdhg", atol=1e-4)
        upper, lower = game.primal_value(result.value[0]), game.dual_value(result.value[1])
        assert lower - EXACT <= truth <= upper + EXACT
        assert upper - lower <= result.gap_bound <= 2.1e-4


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_games(size):
    """Oracle: the only strategy of a 1x1 game; matching pennies is played uniformly."""
    a = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)[:size, :size]
    game = matrix_game(a)
    result = solve(game, "pdhg", atol=1e-9, start=tuple(torch.eye(size).double()[:1].repeat(2, 1)))
    assert result.converged
    for part in result.value:
        assert torch.allclose(part, torch.full_like(part, 1 / size), atol=1e-8)
    value = 1.0 if size == 1 else 0.0
    assert game.primal_value(result.value[0]) == pytest.approx(value, abs=1e-8)


def test_float32_game_stays_float32():
    """Oracle: the value of the same game in float64."""
    a = low_rank(30)
    game, half = matrix_game(a), matrix_game(a.float())
    result = solve(half, "pdhg", atol=1e-3)
    assert result.converged, result.message
    assert result.value[0].dtype == torch.float32
    exact = solve(game, "pdhg", atol=1e-8)
    assert half.primal_value(result.value[0]) == pytest.approx(
        game.primal_value(exact.value[0]), abs=2e-3
    )


def test_constant_operator_needs_no_coupling():
    """Oracle: a separable problem over a box and a ball, solved in closed form."""
    c, b = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, -4.0, 0.0]).double()
    problem = bilinear_saddle(
        torch.zeros(3, 2).double(), cost=c, offset=b, primal=Box(0.0, 1.0), dual=L2Ball(2.0)
    )
    result = solve(problem, "pdhg", atol=1e-9)
    assert result.converged
    assert torch.allclose(result.value[0], torch.tensor([0.0, 1.0]).double(), atol=1e-8)
    assert torch.allclose(result.value[1], -2 * b / b.norm(), atol=1e-8)


def test_a_norm_that_is_too_small_is_enlarged():
    """Oracle: the solution; a constant 5 times too small must not lead to divergence."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(9, 9, generator=g, dtype=torch.float64)
    x, y = torch.randn(2, 9, generator=g, dtype=torch.float64)
    true = float(torch.linalg.matrix_norm(a, 2))
    problem = bilinear_saddle(
        (lambda v: a @ v, lambda v: v @ a), cost=-a.T @ y, offset=a @ x, lipschitz_bound=true / 5
    )
    result = solve(problem, "pdhg", atol=1e-5)
    assert result.converged, result.message
    assert result.lipschitz > problem.lipschitz_bound
    assert torch.allclose(result.value[0], x, atol=1e-3)


def test_warm_start_keeps_the_primal_weight():
    """Oracle: continuing a finished run takes one step; the weight is the one it ended with."""
    g = torch.Generator().manual_seed(3)
    game = matrix_game(torch.randn(15, 25, generator=g, dtype=torch.float64))
    first = solve(game, "pdhg", atol=1e-6)
    seen = []
    again = solve(
        game, "pdhg", atol=1e-6, warm_start=first,
        callback=lambda state, _: seen.append(state.weight.value),
    )  # fmt: skip
    assert again.converged
    assert again.iterations < first.iterations / 3
    assert seen[0] == first.state.weight.value != 1.0


def test_runs_are_deterministic():
    """Oracle: the same run twice, bit for bit."""
    game = matrix_game(low_rank(20))
    first, second = (solve(game, "pdhg", atol=1e-7) for _ in range(2))
    assert first.trace == second.trace
    assert all(torch.equal(p, q) for p, q in zip(first.value, second.value, strict=True))


def test_other_problems_are_refused_with_the_reason():
    """Oracle: the message names what is missing."""
    problem = Inclusion(operator=lambda u: u, start=torch.ones(2))
    with pytest.raises(ConfigError, match="parts of a bilinear saddle point"):
        solve(problem, "pdhg")
    game = matrix_game(low_rank(4))
    for options in ({"reflection": 1.5}, {"step_scale": 1.0}, {"check_every": 0}):
        with pytest.raises(ConfigError):
            solve(game, "pdhg", **options)
    for options in ({"primal_weight": -1.0}, {"sufficient": 1.0}, {"artificial": 0.0}):
        with pytest.raises(ConfigError):
            solve(game, "pdhg", **options)


def test_weight_controller_follows_its_formula():
    """Oracle: exp(0.99 e + 0.01 I) by hand; useless data fall back on the best balance."""
    weight = PrimalWeight().updated((1.0, math.e), (1.0, 10.0))
    assert weight.value == pytest.approx(math.e)
    assert weight.integral == pytest.approx(1.0)
    assert (weight.best, weight.imbalance) == (1.0, pytest.approx(1.0))
    again = weight.updated((1.0, 1.0), (1.0, 1.0))
    assert again.value == pytest.approx(math.e * math.exp(-0.99 + 0.01 * (0.3 - 1.0)))
    assert again.best == pytest.approx(math.e)
    for moved, residuals in (((0.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 0.0))):
        assert again.updated(moved, residuals).integral == 0
    assert again.updated((1.0, math.inf), (0.0, 0.0)).value == again.best
