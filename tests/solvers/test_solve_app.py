"""The standard problems and the command ``solve``."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from solvers import solve, standard_problem
from solvers.library import PROBLEMS, project_simplex
from solvers.solve_app import SolveSettings

BEST = {
    "least_squares": "halpern_restarted",
    "box_least_squares": "halpern_anderson",
    "rotation": "halpern_restarted",
    "saddle": "feg",
    "matrix_game": "eag",
}


@pytest.mark.parametrize("name", sorted(PROBLEMS))
@pytest.mark.parametrize("size", [2, 7, 12])
def test_planted_solutions_are_solutions(name, size):
    """Oracle: the planted point itself; one forward-backward step must not move it."""
    known = standard_problem(name, size=size, seed=3)
    point, problem = known.solution, known.problem
    step = 1e-2 / problem.lipschitz_bound
    moved = point - step * problem.operator(point)
    if problem.resolvent is not None:
        moved = problem.resolvent(moved, step)
    assert torch.allclose(moved, point, atol=1e-12)
    assert known.error(point) <= 1e-12


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_problems_are_solved_by_their_method(name):
    """Oracle: the planted solution through the problem's own error measure."""
    known = standard_problem(name, size=8, seed=1)
    result = solve(known.problem, BEST[name], atol=1e-4)
    assert result.converged, result.message
    assert known.error(result.value) <= 1e-3


def test_simplex_projection_satisfies_its_optimality_condition():
    """Oracle: <p - q, z - q> <= 0 for every vertex z, and q on the simplex."""
    g = torch.Generator().manual_seed(0)
    for size, scale in itertools.product((1, 2, 9), (0.1, 1.0, 100.0)):
        p = scale * torch.randn(size, generator=g, dtype=torch.float64)
        q = project_simplex(p)
        assert float(q.sum()) == pytest.approx(1.0)
        assert q.min() >= 0
        assert float((p - q).max() - (p - q) @ q) <= 1e-9 * max(1.0, scale)


def test_same_seed_same_problem():
    """Oracle: the operator's value, bit for bit; another seed differs."""
    point = torch.linspace(0, 1, 10, dtype=torch.float64)
    values = [
        standard_problem("saddle", size=10, seed=seed).problem.operator(point) for seed in (0, 0, 1)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"problem": "knapsack"},
        {"method": "simplex"},
        {"size": 1},
        {"atol": -1.0},
        {"max_calls": 0},
        {"method": "halpern", "options": {"step_scale": 3.0}},
        {"options": {"unknown": 1}},
    ],
)
def test_settings_refuse_impossible_values(settings):
    """Each is refused before a problem is built."""
    with pytest.raises(ConfigError):
        SolveSettings(**settings)


def test_standard_problem_refuses_bad_requests():
    """Unknown names list the known ones."""
    with pytest.raises(ConfigError, match="matrix_game"):
        standard_problem("knapsack")
    with pytest.raises(ConfigError):
        standard_problem("saddle", size=1)


def test_command_writes_its_summary(lipllm):
    """Oracle: the last line names a summary whose residual meets the tolerance that was set."""
    done = lipllm("solve", "solve.problem=rotation", "solve.size=4", "solve.atol=1e-3")
    assert done.status == 0, done.err
    summary = json.loads(Path(done.out.splitlines()[-1].removeprefix("summary: ")).read_text())
    assert summary["metrics"]["solve/residual"] <= 1e-3
    assert summary["metrics"]["solve/evals"] >= summary["metrics"]["solve/iterations"]


def test_command_refuses_in_one_line(lipllm):
    """A method that the problem rules out: exit 2, one line with the remedy."""
    done = lipllm("solve", "solve.problem=matrix_game", "solve.method=halpern")
    assert done.status == 2
    (line,) = done.err.strip().splitlines()
    assert line.startswith("lipllm: error: ")
    assert "method=forb" in line


def test_new_option_is_told_how_to_be_written(lipllm):
    """Oracle: the remedy itself works."""
    done = lipllm("solve", "solve.options={step_scale: 1.5}")
    assert done.status == 2
    assert "+solve.options.NAME=VALUE" in done.err
    assert lipllm("solve", "solve.size=3", "+solve.options.step_scale=1.5").status == 0
