"""Halpern on the resolvent: the resolvent itself, its certified accuracy, its refusals."""

import pytest
import torch

from common.errors import ConfigError
from solvers import Inclusion, Oracle, Status, make_solver, solve, standard_problem
from solvers.resolvent_halpern import ResolventHalpern


def affine(seed=0, size=8):
    """M z + c with a monotone M that is not symmetric."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(size, size, generator=g, dtype=torch.float64)
    m = 0.05 * m @ m.mT + m - m.mT
    c = torch.randn(size, generator=g, dtype=torch.float64)
    bound = float(torch.linalg.matrix_norm(m, 2))
    start = torch.randn(size, generator=g, dtype=torch.float64)
    return Inclusion(operator=lambda z: m @ z + c, start=start, lipschitz_bound=bound), m, c


@pytest.mark.parametrize("accuracy", [0.5, 1e-2, 1e-6])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_resolvent_is_as_accurate_as_asked(accuracy, scale):
    """Oracle: the linear system (I + eta M) v = u - eta c."""
    problem, m, c = affine()
    solver = ResolventHalpern(step_scale=scale, accuracy=accuracy)
    oracle = Oracle(problem)
    state = solver.init(oracle, problem.start)
    eta = scale / problem.lipschitz_bound
    for _ in range(4):
        following = solver.step(oracle, state)
        system = torch.eye(8, dtype=torch.float64) + eta * m
        exact = torch.linalg.solve(system, state.iterate - eta * c)
        error = float((following.point - exact).norm())
        moved = float((state.iterate - exact).norm())
        assert error <= accuracy / (state.count + 2) * moved * (1 + 1e-9)
        assert torch.allclose(following.value, m @ following.point + c, atol=1e-12)
        state = following


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("name", ["saddle", "matrix_game", "box_least_squares"])
def test_known_problems_are_solved(name, reflect):
    """Oracle: the known solution or the duality gap, and the verified residual."""
    known = standard_problem(name, size=10)
    result = solve(known.problem, "halpern_resolvent", atol=1e-5, reflect=reflect, accuracy=0.1)
    assert result.converged, result.message
    assert result.verify(known.problem) <= 1e-5
    assert known.error(result.value) <= 1e-3


def test_reflection_needs_fewer_resolvents():
    """Oracle: half the bound, so at most three quarters of the resolvents at equal accuracy."""
    problem = affine()[0]
    options = {"atol": 0.3, "accuracy": 0.1, "restart_factor": 0.0, "step_scale": 1.0}
    plain, reflected = (
        solve(problem, "halpern_resolvent", reflect=reflect, **options).iterations
        for reflect in (False, True)
    )
    assert reflected <= 0.75 * plain


def test_constant_that_is_too_small_is_raised():
    """Oracle: the true norm; the result is correct all the same."""
    problem, m, c = affine()
    wrong = Inclusion(
        operator=problem.operator,
        start=problem.start,
        lipschitz_bound=problem.lipschitz_bound / 20,
    )
    result = solve(wrong, "halpern_resolvent", atol=1e-6)
    assert result.converged
    assert result.lipschitz > wrong.lipschitz_bound
    assert torch.allclose(result.value, torch.linalg.solve(m, -c), atol=1e-4)


def test_operator_that_is_not_monotone_is_noticed():
    """Oracle: -u is not monotone, however strongly the identity regularises it."""
    problem = Inclusion(operator=lambda u: -u, start=torch.ones(3, dtype=torch.float64))
    assert solve(problem, "halpern_resolvent").status is Status.NOT_MONOTONE


@pytest.mark.parametrize(
    "options", [{"step_scale": 0.0}, {"accuracy": -1.0}, {"restart_factor": 1.0}, {"inner": 3}]
)
def test_refuses_impossible_settings(options):
    """Each setting is outside what the docstring allows."""
    with pytest.raises(ConfigError):
        make_solver("halpern_resolvent", **options)
