"""Limits of a run and the suspicion that there is no solution."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import SOLVERS, Inclusion, Status, solve
from solvers.exits import Drift, Limits

UNCONSTRAINED = sorted(set(SOLVERS) - {"pdhg", "halpern_resolvent", "lbfgs"})
WITH_RESOLVENT = sorted(set(UNCONSTRAINED) - {"feg", "eag_v"})


@pytest.mark.parametrize(
    "wrong",
    [
        {"atol": -1.0},
        {"rtol": math.nan},
        {"max_iterations": -1},
        {"max_iterations": 2.5},
        {"max_calls": 0},
        {"time_limit": 0.0},
        {"time_limit": math.inf},
    ],
)
def test_limits_refuse_what_cannot_mean_anything(wrong):
    """Oracle: the message names the limit."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)


@pytest.mark.parametrize("method", UNCONSTRAINED)
def test_constant_operator_has_no_solution(method):
    """Oracle: F(u) = c never vanishes; every step moves along -c."""
    c = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    problem = Inclusion(operator=lambda u: c.clone(), start=torch.zeros(3, dtype=torch.float64))
    result = solve(problem, method)
    assert result.status is Status.NO_SOLUTION_SUSPECTED
    assert result.residual == pytest.approx(5.0)
    move = result.displacement / result.displacement.norm()
    assert torch.allclose(move, -c / 5, atol=1e-9)


@pytest.mark.parametrize("method", WITH_RESOLVENT)
def test_force_out_of_an_unbounded_set_has_no_solution(method):
    """Oracle: on the half-line u_0 >= 0 a push to the right never ends; u_1 is at rest."""
    push = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    problem = Inclusion(
        operator=lambda u: push.clone(),
        start=torch.ones(2, dtype=torch.float64),
        resolvent=lambda z, step: z.clamp(min=0.0),
    )
    result = solve(problem, method)
    assert result.status is Status.NO_SOLUTION_SUSPECTED
    assert result.displacement[0] > 0
    assert abs(float(result.displacement[1])) <= 1e-9


def test_line_search_finds_neither_minimum_nor_convexity():
    """Oracle: a constant gradient has no minimum, that of -|u|^2 is not monotone."""
    start = torch.ones(2, dtype=torch.float64)
    constant = solve(Inclusion(operator=torch.ones_like, start=start), "lbfgs")
    assert constant.status is Status.NO_SOLUTION_SUSPECTED
    concave = solve(Inclusion(operator=lambda u: -u, start=start), "lbfgs")
    assert concave.status is Status.NOT_MONOTONE


@pytest.mark.parametrize("method", ["halpern", "eag", "forb"])
def test_distant_and_slow_solutions_are_not_suspected(method):
    """Oracle: solutions 300 steps of constant length away, and along a flat valley."""
    start = torch.zeros(2, dtype=torch.float64)
    far = Inclusion(operator=lambda u: (u - 300).clamp(-1.0, 1.0), start=start, lipschitz_bound=1.0)
    assert solve(far, method, atol=1e-2, max_iterations=3000).status in (
        Status.CONVERGED,
        Status.MAX_ITERATIONS,
    )
    h = torch.tensor([1.0, 1e-5], dtype=torch.float64)
    flat = Inclusion(operator=lambda u: h * (u - 1), start=start, lipschitz_bound=1.0)
    assert solve(flat, method, atol=1e-9, max_iterations=3000).status is not (
        Status.NO_SOLUTION_SUSPECTED
    )


def test_drift_needs_both_signs():
    """Oracle: a synthetic run; a falling residual or a resting point resets the evidence."""
    zero = torch.zeros(1, dtype=torch.float64)
    for residual, distance, expected in (
        (lambda k: 1.0, lambda k: float(k), True),
        (lambda k: 1.0 / k, lambda k: float(k), False),
        (lambda k: 1.0, lambda k: 1.0, False),
        (lambda k: 1.0, lambda k: k**0.5, False),
    ):
        drift = Drift(zero, 1.0)
        hits = [drift.suspects(k, zero + distance(k), residual(k)) for k in range(1, 5000)]
        assert any(hits) is expected
