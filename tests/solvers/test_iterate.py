"""The loop: exits, budgets, best point, continuation."""

import pytest
import torch

from common.errors import ConfigError, ConvergenceError
from solvers import Inclusion, Status, continuation, make_solver, solve


def quadratic(scale=1.0, centre=1.0, dtype=torch.float64):
    """F(u) = H (u - centre) with curvatures from scale / 100 to scale."""
    h = torch.linspace(scale / 100, scale, 8, dtype=dtype)
    return Inclusion(
        operator=lambda u: h * (u - centre),
        start=torch.zeros(8, dtype=dtype),
        lipschitz_bound=scale,
    )


def test_budgets_end_the_run_with_their_status():
    """Oracle: counting by hand; a step of plain Halpern costs one call, so does the start."""
    result = solve(quadratic(), "halpern", atol=0.0, max_iterations=7)
    assert (result.status, result.iterations, result.oracle_calls) == (Status.MAX_ITERATIONS, 7, 9)
    result = solve(quadratic(), "halpern", atol=0.0, max_iterations=7, check=False)
    assert result.oracle_calls == 8
    result = solve(quadratic(), "halpern", atol=0.0, max_calls=5)
    assert (result.status, result.oracle_calls) == (Status.MAX_CALLS, 5)


def test_throw_raises_with_the_message():
    """Oracle: the message of the same run without throw."""
    message = solve(quadratic(), "halpern", atol=0.0, max_iterations=3).message
    with pytest.raises(ConvergenceError) as caught:
        solve(quadratic(), "halpern", atol=0.0, max_iterations=3, throw=True)
    assert str(caught.value) == message
    assert "\n" not in message


def test_callback_stops_and_sees_every_iteration():
    """Oracle: the callback's own count."""
    seen = []
    result = solve(
        quadratic(),
        "halpern",
        atol=0.0,
        callback=lambda state, oracle: seen.append(state.residual) or len(seen) == 4,
    )
    assert result.status is Status.STOPPED
    assert len(seen) == 4
    assert result.residual == min(seen)
    result.raise_for_status()


def test_value_is_the_best_point_seen():
    """Oracle: the residual trace; its minimum belongs to the returned point."""
    problem = quadratic()
    result = solve(problem, "halpern_anderson", atol=0.0, max_iterations=25)
    assert result.residual == min(point.residual for point in result.trace)
    assert result.residual == pytest.approx(float(problem.operator(result.value).norm()), rel=1e-12)


def test_tolerance_below_the_rounding_floor_stalls():
    """Oracle: float32 cannot bring this residual to 1e-12, and the status says so."""
    problem = quadratic(centre=1 / 3, dtype=torch.float32)
    result = solve(problem, "halpern_restarted", atol=1e-12, max_iterations=5000)
    assert result.status is Status.STALLED
    assert result.residual < 1e-5


def test_false_claim_is_not_called_converged():
    """Oracle: L given far too small hides the residual of F(v) + g; the check recomputes it."""
    h = torch.tensor([1.0, 100.0], dtype=torch.float64)
    problem = Inclusion(
        operator=lambda u: h * (u - 0.5),
        start=torch.tensor([0.5, 0.5005], dtype=torch.float64),
        resolvent=lambda u, step: u.clamp(-1.0, 1.0),
        lipschitz_bound=1e-3,
    )
    result = solve(problem, "halpern", atol=1e-3)
    assert result.converged
    normal = -h * (result.value - 0.5)
    inside = result.value.abs() < 1
    assert float(normal[inside].norm()) <= 1e-3


def test_continuation_starts_each_stage_where_the_last_ended():
    """Oracle: the recorded starts and values of the stages."""
    starts = []

    def stage(scale):
        def build(start):
            starts.append(start)
            base = quadratic(scale)
            return Inclusion(operator=base.operator, start=start, lipschitz_bound=scale)

        return build

    results = continuation(
        [stage(s) for s in (4.0, 2.0, 1.0)],
        make_solver("halpern_restarted"),
        torch.zeros(8, dtype=torch.float64),
        callback=lambda state, oracle: False,
    )
    assert len(results) == 3
    for before, after in zip(results, starts[1:], strict=False):
        assert torch.equal(before.value, after)
    assert results[-1].residual <= 1e-3 * results[-1].trace[0].residual


@pytest.mark.parametrize(
    "settings", [{"atol": -1.0}, {"rtol": float("nan")}, {"max_iterations": -1}]
)
def test_solve_refuses_impossible_tolerances(settings):
    """Negative and NaN settings cannot mean anything."""
    with pytest.raises(ConfigError):
        solve(quadratic(), "halpern", **settings)
