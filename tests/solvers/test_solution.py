"""Results: every claim can be recomputed from the problem alone."""

import dataclasses

import pytest
import torch

from common.errors import CertificateError, ConvergenceError, ShapeError
from solvers import SOLVERS, Inclusion, Status, solve
from solvers.resolvents import Box, L2Ball, Simplex

ROUNDING = 1e-12
WITH_RESOLVENT = sorted(set(SOLVERS) - {"feg", "eag_v", "lbfgs", "pdhg"})
SETS = {
    "box": Box(0.0, 0.3),
    "simplex": Simplex(),
    "ball": L2Ball(0.5),
    "plain": lambda z, step: z.clamp(-0.1, 0.2),
}


def on_set(resolvent, dtype=torch.float64):
    """Least squares whose solution lies on the border of the set."""
    g = torch.Generator().manual_seed(3)
    a = torch.randn(12, 8, generator=g, dtype=torch.float64)
    b = torch.randn(12, generator=g, dtype=torch.float64)
    h, c = (a.T @ a).to(dtype), (a.T @ b).to(dtype)
    return Inclusion(
        operator=lambda x: h.to(x.dtype) @ x - c.to(x.dtype),
        start=torch.full((8,), 0.125, dtype=dtype),
        resolvent=resolvent,
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)) ** 2,
        cocoercive=True,
    )


@pytest.mark.parametrize("name", sorted(SETS))
@pytest.mark.parametrize("method", WITH_RESOLVENT)
def test_residual_equals_its_verification(method, name):
    """Oracle: |F(v) + g| by hand, and J(v + t g) = v for several t, which defines g in G(v)."""
    problem = on_set(SETS[name])
    result = solve(problem, method, rtol=1e-3, max_iterations=3000)
    by_hand = float((problem.operator(result.value) + result.normal).norm())
    assert result.residual == pytest.approx(by_hand, rel=1e-9, abs=ROUNDING)
    assert result.verify(problem) == pytest.approx(result.residual, rel=1e-9, abs=ROUNDING)
    for step in (0.1, 1.0, 10.0):
        mapped = problem.resolvent(result.value + step * result.normal, step)
        assert torch.allclose(mapped, result.value, atol=1e-9 * (1 + step))


@pytest.mark.parametrize("name", ["box", "simplex", "ball"])
def test_natural_residual_and_gap_obey_their_bounds(name):
    """Oracle: |v - J(v - F(v)/L)| L <= residual; f(v) - f* <= residual * diameter (f by hand)."""
    problem = on_set(SETS[name])
    best = solve(problem, "halpern_restarted", atol=1e-10).value

    def objective(x):
        return float(
            0.5 * x @ problem.operator(x) + 0.5 * x @ problem.operator(torch.zeros_like(x))
        )

    for steps in (0, 3, 30):
        result = solve(problem, "eag", max_iterations=steps)
        assert 0 <= result.natural_residual <= result.residual * (1 + 1e-9)
        gap = objective(result.value) - objective(best)
        assert -ROUNDING <= gap <= result.gap_bound
        diameter = problem.resolvent.diameter(problem.start)
        assert result.gap_bound == pytest.approx(result.residual * diameter)


def test_gap_bound_is_silent_where_the_diameter_is_unknown():
    """No resolvent, a plain function and an unbounded set state no diameter."""
    for resolvent in (None, lambda z, step: z.clamp(0.0, 1.0), Box(0.0)):
        problem = Inclusion(operator=lambda u: u - 1, start=torch.zeros(2), resolvent=resolvent)
        assert solve(problem, "halpern_restarted", atol=1e-3).gap_bound is None


def test_without_a_resolvent_all_residuals_agree():
    """Oracle: the norm of F at the returned point."""
    problem = dataclasses.replace(on_set(None), cocoercive=None)
    result = solve(problem, "feg", rtol=1e-3)
    assert result.normal is None
    assert result.residual == result.natural_residual == result.verify(problem)


def test_forged_results_are_refused():
    """A point moved off its residual shows; a normal that is none is refused."""
    problem = on_set(SETS["box"])
    result = solve(problem, "eag", atol=1e-6)
    moved = dataclasses.replace(result, value=result.value * 0.5, normal=0 * result.normal)
    assert moved.verify(problem) > 1e-2
    # The perfect residual: minus F is no normal of the box at a point inside it.
    forged = dataclasses.replace(result, normal=-problem.operator(result.value * 0.5))
    forged = dataclasses.replace(forged, value=result.value * 0.5)
    with pytest.raises(CertificateError, match="not an element"):
        forged.verify(problem)
    with pytest.raises(CertificateError, match="missing"):
        dataclasses.replace(result, normal=None).verify(problem)
    with pytest.raises(CertificateError, match="not an element"):
        dataclasses.replace(result, normal=result.normal * torch.nan).verify(problem)
    with pytest.raises(ShapeError):
        dataclasses.replace(result, value=result.value[:3]).verify(problem)


@pytest.mark.parametrize("method", ["halpern_restarted", "eag", "forb"])
def test_float32_residual_is_the_one_of_float64(method):
    """Oracle: F in float64 at the returned float32 point, plus the returned normal."""
    problem = on_set(SETS["box"], torch.float32)
    result = solve(problem, method, atol=1e-3)
    assert result.converged
    assert result.value.dtype == torch.float32
    exact = problem.operator(result.value.double()) + result.normal.double()
    assert result.residual == pytest.approx(float(exact.norm()), rel=ROUNDING)
    assert result.verify(problem) == pytest.approx(result.residual, rel=ROUNDING)


def test_message_is_one_line_with_the_figures():
    """Oracle: the fields of the result; throw raises with the same words."""
    problem = on_set(SETS["box"])
    result = solve(problem, "eag", atol=0.0, max_iterations=3)
    assert result.status is Status.MAX_ITERATIONS
    for part in ("eag", f"{result.residual:.3e}", "3 iterations", f"{result.oracle_calls} calls"):
        assert part in result.message
    assert "\n" not in result.message
    with pytest.raises(ConvergenceError, match="iteration limit"):
        result.raise_for_status()
