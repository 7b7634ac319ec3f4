"""Extragradient, its anchored form and FoRB on monotone problems that are not cocoercive."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import Inclusion, Status, iterate, make_solver, solve, standard_problem

MONOTONE = ("extragradient", "eag", "forb")
ROUNDING = 1e-9


def plane_rotation():
    """F(x, y) = (y, -x): the smallest monotone operator that is not cocoercive."""
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return Inclusion(operator=lambda z: skew @ z, start=start, lipschitz_bound=1.0)


@pytest.mark.parametrize("method", MONOTONE)
def test_skew_operator_is_solved(method):
    """Oracle: the zero is 0; plain gradient steps move away from it."""
    problem = plane_rotation()
    result = solve(problem, method, atol=1e-6)
    assert result.converged
    assert float(result.value.norm()) <= 1e-6 + ROUNDING
    plain = problem.start
    for _ in range(50):
        plain = plain - 0.5 * problem.operator(plain)
    assert float(plain.norm()) > float(problem.start.norm())


def test_fast_extragradient_meets_its_rate():
    """Oracle: |F(z_k)| <= 2 L D / k for every k, without restarts."""
    for problem in (plane_rotation(), standard_problem("saddle", size=20).problem):
        seen = []
        truth = solve(problem, "feg", atol=1e-9).value
        iterate(
            problem,
            make_solver("feg", restart_factor=0.0),
            atol=0.0,
            max_iterations=200,
            callback=lambda state, oracle, seen=seen: seen.append(state.residual),
        )
        distance = float((problem.start - truth).norm())
        bound = 2 * problem.lipschitz_bound * distance
        assert all(residual <= bound / k * (1 + 1e-6) for k, residual in enumerate(seen) if k)


@pytest.mark.parametrize("method", MONOTONE)
def test_matrix_game_gap_is_bounded_by_the_residual(method):
    """Oracle: the duality gap at best responses, at most residual * diameter (here 2)."""
    known = standard_problem("matrix_game", size=10).as_sum()
    result = solve(known.problem, method, atol=1e-3)
    assert result.converged
    assert result.value.min() >= 0
    assert float(result.value[:5].sum()) == pytest.approx(1.0)
    assert known.error(result.value) + ROUNDING >= 0
    assert known.error(result.value) <= 2 * result.residual + ROUNDING


@pytest.mark.parametrize("method", MONOTONE)
def test_residual_is_reached_with_a_true_element_of_the_cone(method):
    """Oracle: for a box, -F must vanish inside, be >= 0 at the top and <= 0 at the bottom."""
    known = standard_problem("box_least_squares", size=12)
    result = solve(known.problem, method, atol=1e-5)
    assert result.converged
    assert known.error(result.value) <= 1e-4
    force = -known.problem.operator(result.value)
    inside = (result.value > 0) & (result.value < 1)
    assert float(force[inside].norm()) <= 1e-5
    assert float(force[result.value == 1].min()) >= -1e-5
    assert float(force[result.value == 0].max()) <= 1e-5


@pytest.mark.parametrize("method", MONOTONE)
def test_lipschitz_constant_that_is_too_small_is_raised(method):
    """Oracle: the known solution; the constant in use ends above a tenth of the true one."""
    known = standard_problem("saddle", size=10)
    true = known.problem.lipschitz_bound
    wrong = Inclusion(
        operator=known.problem.operator, start=known.problem.start, lipschitz_bound=true / 10
    )
    result = solve(wrong, method, atol=1e-5)
    assert result.converged
    assert known.error(result.value) <= 1e-4
    assert result.lipschitz > true / 10


@pytest.mark.parametrize("method", MONOTONE)
def test_refuses_operators_that_are_not_monotone_or_not_finite(method):
    """-u is not monotone; NaN at the start is refused before any step."""
    start = torch.ones(3, dtype=torch.float64)
    result = solve(Inclusion(operator=lambda u: -u, start=start), method)
    assert result.status is Status.NOT_MONOTONE
    with pytest.raises(ConfigError, match="not finite"):
        solve(Inclusion(operator=lambda u: u * math.nan, start=start), method)

    def fragile(u):
        return u if torch.equal(u, start) else u * math.nan

    result = solve(Inclusion(operator=fragile, start=start, lipschitz_bound=1.0), method)
    assert result.status is Status.NONFINITE
    assert torch.isfinite(result.value).all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("extragradient", {"step_scale": 1.5}),
        ("extragradient", {"step_scale": 0.0}),
        ("eag", {"restart_factor": 1.0}),
        ("eag_v", {"step_scale": 0.76}),
        ("forb", {"step_scale": 0.6}),
    ],
)
def test_refuses_impossible_settings(method, options):
    """Steps beyond what the convergence proofs cover."""
    with pytest.raises(ConfigError):
        make_solver(method, **options)


@pytest.mark.parametrize("method", ["feg", "eag"])
def test_estimated_constant_follows_a_flatter_operator(method):
    """Oracle: the same run without relaxation; (z - 1)^3 flattens towards its zero."""
    g = torch.Generator().manual_seed(0)
    skew = torch.randn(6, 6, generator=g, dtype=torch.float64)
    skew = 0.1 * (skew - skew.T)
    problem = Inclusion(
        operator=lambda z: (z - 1) ** 3 + skew @ (z - 1),
        start=torch.full((6,), 5.0, dtype=torch.float64),
    )
    plain, relaxed = (
        solve(problem, method, atol=1e-2, relax_lipschitz=factor) for factor in (1.0, 0.7)
    )
    assert relaxed.converged
    assert relaxed.lipschitz < plain.lipschitz / 4
    assert relaxed.full_evals < plain.full_evals / 2


@pytest.mark.parametrize("fields", [{"lipschitz_bound": 5.65}, {"linear": True}])
def test_known_constant_is_never_relaxed(fields):
    """Oracle: the trace; a bound, and the norm of a linear operator, are the least constants."""
    known = standard_problem("saddle", size=6).problem
    problem = Inclusion(operator=known.operator, start=known.start, **fields)
    result = solve(problem, "feg", atol=1e-4)
    assert result.restarts > 3
    assert min(point.lipschitz for point in result.trace) >= known.lipschitz_bound * (1 - 1e-2)
