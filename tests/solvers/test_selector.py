"""The default method of each class of problems (spec halpern_solvers 0)."""

import pytest
import torch

from common.errors import ConfigError
from solvers import FiniteSumInclusion, Inclusion, Status, fixed_point, matrix_game, solve
from solvers.resolvents import Box
from solvers.selector import choose

START = torch.zeros(4, dtype=torch.float64)
SKEW = torch.tensor(
    [[0, 0, 1, 2], [0, 0, 0, 1], [-1, 0, 0, 0], [-2, -1, 0, 0]], dtype=torch.float64
)


def single(cocoercive=None, resolvent=None):
    """F(u) = u - 1."""
    return Inclusion(
        operator=lambda u: u - 1,
        start=START,
        resolvent=resolvent,
        lipschitz_bound=1.0,
        cocoercive=cocoercive,
    )


def summed(num, *, cocoercive, component=1.0, mean=1.0):
    """A sum whose constants are as given."""
    return FiniteSumInclusion(
        components=lambda z, index, weight: weight.sum() * (z - 1),
        num_components=num,
        start=START,
        lipschitz_bound=mean,
        component_lipschitz=torch.full((num,), component, dtype=torch.float64),
        cocoercive=cocoercive,
    )


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        (single(True), "halpern_restarted"),
        (single(True, Box(0.0, 0.5)), "halpern_restarted"),
        (fixed_point(lambda u: u / 2, START), "halpern_restarted"),
        (single(False), "feg"),
        (single(False, Box(0.0, 0.5)), "eag"),
        (matrix_game(torch.eye(3, dtype=torch.float64)), "pdhg"),
        (summed(400, cocoercive=True, component=1.9), "vr_halpern"),
        (summed(400, cocoercive=True, component=2.5), "halpern_restarted"),
        (summed(100, cocoercive=True), "halpern_restarted"),
        (summed(400, cocoercive=False, component=4.9), "inexact_halpern"),
        (summed(400, cocoercive=False, component=5.1), "feg"),
        (summed(100, cocoercive=False), "feg"),
    ],
)
def test_each_class_gets_the_method_of_the_specification(problem, method):
    """Oracle: the table; thresholds N >= 200, L_sampled <= 2 L_F, N > (4 L_Q / L_F)^2."""
    choice = choose(problem)
    assert choice.method == method
    result = solve(problem, max_iterations=20_000, atol=1e-3)
    assert result.converged, result.message
    assert result.method == method
    assert f"{method} was chosen because" in result.message
    assert "\n" not in result.message


@pytest.mark.parametrize(("resolvent", "method"), [(None, "feg"), (Box(-2.0, 2.0), "eag")])
def test_undeclared_skew_operator_is_taken_over(resolvent, method):
    """Oracle: the zero is 1; both runs are paid for, and the message tells the story."""
    problem = Inclusion(operator=lambda u: SKEW @ (u - 1), start=START, resolvent=resolvent)
    first = solve(problem, "halpern_restarted", atol=1e-6)
    assert first.status is Status.ASSUMPTION_VIOLATED
    result = solve(problem, atol=1e-6)
    assert result.converged
    assert result.method == method
    assert f"{method} took over" in result.message
    assert torch.allclose(result.value, torch.ones(4, dtype=torch.float64), atol=1e-4)
    alone = solve(problem, method, atol=1e-6)
    assert result.oracle_calls == first.oracle_calls + alone.oracle_calls
    assert len(result.trace) == len(first.trace) + len(alone.trace)
    assert [p.calls for p in result.trace] == sorted(p.calls for p in result.trace)


def test_method_options_need_a_method_that_knows_them():
    """An option of another method is refused also when the method is chosen automatically."""
    with pytest.raises(ConfigError, match="memory"):
        solve(single(True), memory=3)


def test_options_are_refused_where_the_method_may_change():
    """Oracle: the same option means another step to the method that may take over."""
    with pytest.raises(ConfigError, match=r"step_scale: method=auto may change .* to feg"):
        solve(single(), step_scale=1.0)
    result = solve(summed(400, cocoercive=True, component=1.9), seed=3, atol=1e-3)
    assert result.converged, result.message


def test_both_methods_share_one_budget():
    """Oracle: the calls of both runs together, at most one step over the limit."""
    problem = Inclusion(operator=lambda u: SKEW @ (u - 1), start=START)
    first = solve(problem, "halpern_restarted", atol=1e-6)
    limit = first.oracle_calls + 6
    result = solve(problem, atol=1e-6, max_calls=limit)
    assert result.status is Status.MAX_CALLS
    assert result.method == "feg"
    assert limit <= result.oracle_calls <= limit + 2
