"""The loop's dealings with time, trouble and earlier results (spec halpern_solvers 7.2)."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import SOLVERS, FiniteSumInclusion, Inclusion, Status, iterate, make_solver, solve
from solvers.lipschitz import first_lipschitz
from solvers.resolvents import Simplex
from solvers.solution import State
from solvers.structure import norm

PLAIN = sorted(set(SOLVERS) - {"pdhg"})
SKEW = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Descent:
    """Steps of 1/L without any safeguard, which only the loop can save."""

    name: ClassVar[str] = "descent"

    def init(self, oracle, start):
        """Evaluate at the start."""
        value = oracle.first_value(start)
        return self._state(start, value, first_lipschitz(oracle, start, value))

    def step(self, oracle, state):
        """Step and believe."""
        point = state.point - state.value / state.lipschitz
        following = self._state(point, oracle.full(point), state.lipschitz)
        return replace(following, restarts=state.restarts)

    def _state(self, point, value, lipschitz):
        return State(
            point=point,
            normal=None,
            residual=norm(value),
            exact=True,
            lipschitz=lipschitz,
            value=value,
        )


@dataclass(frozen=True)
class Liar(Descent):
    """Claims convergence at once."""

    name: ClassVar[str] = "liar"

    def step(self, oracle, state):
        """Move nowhere and claim everything."""
        return replace(state, residual=0.0, exact=False, value=None)


def quadratic(**fields):
    """H (u - 1/3) with curvatures 0.1 to 1."""
    h = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
    start = torch.zeros(8, dtype=torch.float64)
    return Inclusion(operator=lambda u: h * (u - 1 / 3), start=start, **fields)


def test_divergence_halves_the_step_from_the_best_point():
    """Oracle: descent needs L above 1/2; given 1/50 it overshoots until the loop has raised it."""
    result = iterate(quadratic(lipschitz_bound=0.02), Descent(), atol=1e-8)
    assert result.converged
    assert result.restarts >= 5
    assert 0.5 < result.lipschitz <= 2.0
    assert result.lipschitz_source == "backtracked"
    assert torch.isfinite(result.value).all()


def test_divergence_that_no_step_cures_ends_at_the_best_point():
    """Oracle: descent spirals out of a skew operator for every step; the start is the best."""
    start = torch.ones(2, dtype=torch.float64)
    problem = Inclusion(operator=lambda u: SKEW @ u, start=start, lipschitz_bound=0.01)
    result = iterate(problem, Descent(), max_iterations=3000)
    assert result.status is Status.DIVERGED
    assert torch.equal(result.value, start)
    assert result.residual == pytest.approx(math.sqrt(2))


def test_a_false_claim_is_not_believed():
    """Oracle: the residual recomputed by hand at the start, where the method stays."""
    problem = quadratic(lipschitz_bound=1.0)
    result = iterate(problem, Liar(), max_iterations=5)
    assert result.status is not Status.CONVERGED
    assert result.residual == pytest.approx(norm(problem.operator(problem.start)))


@pytest.mark.parametrize("method", ["halpern", "eag", "forb", "halpern_resolvent"])
def test_wall_of_nan_ends_the_run_and_names_the_component(method):
    """Oracle: component 37 was poisoned between start and solution; no method creeps along it."""
    start = torch.zeros(2, dtype=torch.float64)

    def components(z, index, weight):
        value = weight.sum() * (z - 1)
        return value * math.nan if bool((index == 37).any()) and bool(z.norm() > 0.1) else value

    problem = FiniteSumInclusion(
        components=components, num_components=100, start=start, lipschitz_bound=1.0
    )
    result = solve(problem, method)
    assert result.status is Status.NONFINITE
    assert "Component 37 " in result.message
    assert torch.isfinite(result.value).all()


@pytest.mark.parametrize("method", PLAIN)
def test_time_limit_returns_the_best_certified_point(method):
    """Oracle: the status, and the residual recomputed from the problem."""
    problem = quadratic(lipschitz_bound=1.0)
    result = solve(problem, method, atol=0.0, time_limit=1e-6)
    assert result.status is Status.TIME_LIMIT
    assert result.verify(problem) == pytest.approx(result.residual)


@pytest.mark.parametrize("method", PLAIN)
def test_interrupt_in_the_callback_stops_with_a_result(method):
    """Oracle: an interrupt from the keyboard in the third call."""
    seen = []

    def callback(state, oracle):
        seen.append(state.residual)
        if len(seen) == 3:
            raise KeyboardInterrupt

    result = solve(quadratic(lipschitz_bound=1.0), method, atol=0.0, callback=callback)
    assert result.status is Status.STOPPED
    assert result.residual <= min(seen) * (1 + 1e-9)


@pytest.mark.parametrize("method", PLAIN)
def test_zero_tolerance_is_met_only_by_a_zero_residual(method):
    """Oracle: the status says converged exactly where the residual is 0."""
    result = solve(quadratic(lipschitz_bound=1.0), method, atol=0.0, max_iterations=100)
    assert result.converged == (result.residual == 0.0)


@pytest.mark.parametrize(
    "method", sorted(set(PLAIN) - {"feg", "eag_v", "lbfgs", "halpern", "halpern_reflected"})
)
def test_zero_operator_is_solved_by_the_projection(method):
    """Oracle: F = 0 with L = 0 given; the projection of the start is a solution."""
    problem = Inclusion(
        operator=torch.zeros_like,
        start=torch.ones(3, dtype=torch.float64),
        resolvent=lambda z, step: z.clamp(min=2.0),
        lipschitz_bound=0.0,
    )
    result = solve(problem, method)
    assert result.converged
    assert torch.equal(result.value, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("method", ["halpern_restarted", "feg", "eag", "forb", "halpern_resolvent"])
def test_stall_names_the_floor(method):
    """Oracle: float32 cannot reach 1e-12; the message gives the floor that it can reach."""
    h = torch.linspace(0.1, 1.0, 8)
    problem = Inclusion(
        operator=lambda u: h * (u - 1 / 3), start=torch.zeros(8), lipschitz_bound=1.0
    )
    result = solve(problem, method, atol=1e-12, max_iterations=5000)
    assert result.status is Status.STALLED
    assert "floor of float32 is" in result.message
    assert result.residual < 1e-5


@pytest.mark.parametrize("method", ["halpern_restarted", "halpern_anderson", "feg", "eag", "forb"])
def test_warm_start_keeps_the_constant_and_begins_counting_again(method):
    """Oracle: the first trace entry of the second run; fewer steps than from scratch."""
    problem = quadratic()
    cold = solve(problem, method, atol=1e-8)
    half = solve(problem, method, atol=1e-4)
    warm = solve(problem, method, atol=1e-8, warm_start=half)
    assert cold.converged
    assert warm.converged
    assert warm.trace[0].lipschitz == half.lipschitz
    assert warm.trace[0].residual == pytest.approx(half.residual)
    assert warm.iterations < cold.iterations
    states = []
    solver = make_solver(method)
    iterate(
        problem,
        solver,
        warm_start=half,
        max_iterations=0,
        callback=lambda state, oracle: states.append(state),
    )
    assert getattr(states[0], "count", 0) == 0
    if hasattr(states[0], "anchor"):
        assert torch.equal(states[0].anchor, half.value)


def test_two_starts_are_refused():
    """A start and a warm start contradict each other."""
    problem = quadratic()
    with pytest.raises(ConfigError, match="warm_start"):
        solve(problem, "eag", start=problem.start, warm_start=solve(problem, "eag", atol=1e-2))


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (torch.full((8,), math.nan, dtype=torch.float64), ConfigError),
        (torch.zeros(8, dtype=torch.long), ShapeError),
        (torch.zeros(7, dtype=torch.float64), ShapeError),
        ((torch.zeros(8, dtype=torch.float64),), ShapeError),
    ],
)
def test_start_given_to_solve_is_checked_like_the_problems_own(start, error):
    """NaN, integers, another shape, another structure."""
    with pytest.raises(error, match="start"):
        solve(quadratic(), "eag", start=start)


def test_relative_tolerance_counts_the_force_on_the_tangent_space():
    """Oracle: F without its mean, on a simplex; a plain function knows no tangent space."""
    c = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64)
    start = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    simplex = Simplex()
    scales = []
    for resolvent in (simplex, lambda z, step: simplex(z, step)):
        iterate(
            Inclusion(operator=lambda u: c + u, start=start, resolvent=resolvent),
            make_solver("eag"),
            max_iterations=0,
            callback=lambda state, oracle: scales.append(oracle.scale),
        )
    force = c + start
    assert scales == [pytest.approx(float((force - force.mean()).norm())), 0.0]


def test_best_residual_never_rises_with_more_work():
    """Oracle: the same deterministic run, cut at several lengths."""
    problem = quadratic(lipschitz_bound=1.0)
    for method in ("feg", "eag", "forb", "extragradient", "halpern_restarted"):
        cuts = [
            solve(problem, method, atol=0.0, max_iterations=n).residual for n in (1, 5, 25, 125)
        ]
        assert cuts == sorted(cuts, reverse=True)


@pytest.mark.parametrize(
    ("method", "taken_over"),
    [
        ("vr_halpern", "halpern_restarted"),
        ("inexact_halpern", "feg"),
        ("vr_extragradient", "extragradient"),
    ],
)
def test_one_component_leaves_nothing_to_sample(method, taken_over):
    """Oracle: the run of the deterministic method, step for step; the message says so."""
    problem = quadratic(lipschitz_bound=1.0)
    expected, result = (solve(problem, name, atol=1e-3) for name in (taken_over, method))
    assert result.converged
    assert result.trace == expected.trace
    assert result.component_evals == 0
    assert f"{taken_over} took over" in result.message
