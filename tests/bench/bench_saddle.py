"""Iterations of PDHG on linear programs and matrix games, against the other methods.

The figures are counts, hence the same on every machine; a missed level counts as infinity.
Source of the budgets: spec halpern_solvers 4.1 and 4.4, with 20 %.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from solvers import iterate, linear_program, make_solver, matrix_game, solve_linear_program
from solvers.games import policeman_burglar
from solvers.resolvents import project_simplex

SEEDS = range(5)
LIMIT = 10_000
FIXED = {"adapt_weight": False, "primal_weight": 1.0}
LP_VARIANTS = {
    "reflected, no restart": {"restart": False, "diagonal": False},
    "plain": {"reflection": 0.0, "adapt_weight": False, "diagonal": False},
    "reflected": {"adapt_weight": False, "diagonal": False},
    "plain, weight": {"reflection": 0.0, "diagonal": False},
    "reflected, weight": {"diagonal": False},
    "reflected, weight, diagonal": {},
}
LP_SPEC = {"plain": 2100, "reflected": 1250, "plain, weight": 1150, "reflected, weight": 750}
GAME_METHODS = {
    "pdhg": ("pdhg", {}),
    "pdhg, fixed weight": ("pdhg", FIXED),
    "forb": ("forb", {}),
    "extragradient": ("extragradient", {}),
    "eag": ("eag", {}),
}
BURGLAR_LEVELS = (5e-2, 2e-2, 1e-2, 5e-3, 1e-3)
BURGLAR_SPEC = {
    "pdhg, fixed weight": (8, 52, 85, 193, 783),
    "forb": (18, 117, 190, 428, 1736),
    "extragradient": (19, 117, 191, 429, 1737),
}


def planted(seed, num_rows=40, num_columns=100):
    """Return a program with a planted optimum: complementary x and slack of random support."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(num_rows, num_columns, generator=g, dtype=torch.float64)
    x, s = torch.randn(2, num_columns, generator=g, dtype=torch.float64).abs()
    used = torch.rand(num_columns, generator=g, dtype=torch.float64) < num_rows / num_columns
    y = torch.randn(num_rows, generator=g, dtype=torch.float64)
    x, s = torch.where(used, x, 0.0), torch.where(used, 0.0, s)
    return linear_program(a.T @ y + s, equal=(a, a @ x))


def epochs(problem, payoff, method, levels, limit=3000, **options):
    """Return the full evaluations until the natural residual of unit step meets each level."""
    found = dict.fromkeys(levels, math.inf)

    def callback(state, oracle):
        x, y = oracle.structure.unpack(state.point)
        moved = x - project_simplex(x - payoff.T @ y), y - project_simplex(y + payoff @ x)
        residual = float(torch.cat(moved).norm())
        for level in levels:
            if residual <= level and math.isinf(found[level]):
                found[level] = oracle.full_evals
        return math.isfinite(found[levels[-1]])

    solver = make_solver(method, **options)
    iterate(problem, solver, atol=0, max_iterations=limit, callback=callback, check=False)
    return found


@pytest.mark.parametrize("variant", LP_VARIANTS)
def test_linear_program_iterations(bench, variant):
    """Iterations to relative errors of 1e-8 on random programs with 40 rows, 100 columns."""
    counts = []
    for seed in SEEDS:
        result = solve_linear_program(
            planted(seed), rtol=1e-8, max_iterations=LIMIT, **LP_VARIANTS[variant]
        )
        counts.append(float(result.run.iterations) if result.status == "optimal" else math.inf)
    bench.add(f"LP 40x100: {variant}", counts, "steps", specification=LP_SPEC.get(variant))


@pytest.mark.parametrize("method", ["forb", "eag"])
def test_linear_program_with_other_methods(bench, method):
    """The same programs without the primal-dual structure, to 1e-2 only."""
    counts = []
    for seed in SEEDS:
        result = solve_linear_program(planted(seed), rtol=1e-4, method=method, max_iterations=LIMIT)
        counts.append(float(result.run.full_evals) if result.status == "optimal" else math.inf)
    bench.add(f"LP 40x100 to 1e-2: {method}", counts, "epochs")


def test_linear_program_to_a_loose_tolerance(bench):
    """What the row before compares with."""
    counts = [
        float(solve_linear_program(planted(seed), rtol=1e-2).run.full_evals) for seed in SEEDS
    ]
    bench.add("LP 40x100 to 1e-2: pdhg", counts, "epochs")


@pytest.mark.parametrize("name", GAME_METHODS)
@pytest.mark.parametrize("size", [100, 400, 1600])
def test_low_rank_games(bench, size, name):
    """Epochs to 4e-3 on centred games of rank 3 with 1 % noise, from a random strategy."""
    counts = []
    for seed in SEEDS if size < 1000 else range(1):
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(size, 3, generator=g, dtype=torch.float64)
        a = a @ torch.randn(3, size, generator=g, dtype=torch.float64)
        a += 0.01 * a.abs().mean() * torch.randn(size, size, generator=g, dtype=torch.float64)
        a = a - a.mean(0) - a.mean(1, keepdim=True) + a.mean()
        a *= math.sqrt(size) / float(torch.linalg.matrix_norm(a, 2))
        start = torch.rand(2, size, generator=g, dtype=torch.float64)
        game = replace(matrix_game(a), start=tuple(play / play.sum() for play in start))
        method, options = GAME_METHODS[name]
        counts.append(float(epochs(game, a, method, (4e-3,), limit=300, **options)[4e-3]))
    budget = 1.2 * 11 + 1 if method == "pdhg" else None
    bench.add(f"low-rank game {size}: {name}", counts, "epochs", most=budget)


@pytest.mark.parametrize("name", GAME_METHODS)
def test_policeman_burglar(bench, name):
    """Epochs on the paper's game of 200 moves; the start counts as one."""
    payoff = policeman_burglar(torch.tensor(np.abs(np.random.RandomState(1).randn(200))))
    method, options = GAME_METHODS[name]
    found = epochs(matrix_game(payoff), payoff, method, BURGLAR_LEVELS, **options)
    for place, level in enumerate(BURGLAR_LEVELS):
        spec = BURGLAR_SPEC[name][place] if name in BURGLAR_SPEC else None
        budget = None if spec is None else 1.2 * spec + 1
        bench.add(
            f"burglar {level:g}: {name}", [float(found[level])], "epochs", most=budget,
            specification=spec,
        )  # fmt: skip


def test_policeman_burglar_without_centring(bench):
    """What centring is worth."""
    payoff = policeman_burglar(torch.tensor(np.abs(np.random.RandomState(1).randn(200))))
    game = matrix_game(payoff, centered=False)
    found = epochs(game, payoff, "pdhg", BURGLAR_LEVELS[:2], **FIXED)
    for level, spec in zip(BURGLAR_LEVELS[:2], (371, 2533), strict=True):
        count = [float(found[level])]
        bench.add(f"burglar {level:g}: pdhg, not centred", count, "epochs", specification=spec)
