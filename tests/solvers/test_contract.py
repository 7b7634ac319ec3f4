"""Every method of the registry on every problem of the library: it solves it or says why not."""

import dataclasses
import functools

import pytest
import torch

from common.errors import ConfigError
from solvers import SOLVERS, Status, solve, standard_problem
from solvers.iterate import make_solver
from solvers.library import PROBLEMS

# What keeps one cell below a second; problems that are not listed have 8 unknowns.
SIZES = {"matching_pennies": 4, "rock_paper_scissors": 6, "quadratic": 6, "low_rank_game": 16}
SIZES |= {"shared_multipliers": 4, "linear_program": 9, "bilinear_sum": 6}
OPTIONS = {
    "shared_multipliers": {"components": 3, "width": 3},
    "group_dro": {"components": 40, "groups": 3},
    "elastic_net": {"components": 24},
    "least_squares_sum": {"components": 24},
    "bilinear_sum": {"components": 12},
}
# Relative tolerance: loose where the plain O(1/k) methods would take too long otherwise.
RTOL = {"linear_program": 0.05, "quadratic": 0.05, "shared_multipliers": 0.1, "matrix_game": 0.05}
RTOL |= {"policeman_burglar": 0.05}
DEFAULT_RTOL = 0.01
MAX_ITERATIONS = 20_000
ROUNDING = 1e-9

# What each method cannot do, and must say so; a new method solves everything or is added here.
NEEDS_COCOERCIVE = {"halpern", "halpern_reflected", "halpern_restarted", "halpern_anderson"}
NEEDS_COCOERCIVE |= {"vr_halpern"}
NEEDS_NO_RESOLVENT = {"feg", "eag_v", "lbfgs"}
NEEDS_SADDLE = {"pdhg"}
# L-BFGS cannot know that an operator is no gradient until it meets the contradiction.
NEEDS_GRADIENT = {"lbfgs"}
NO_GRADIENT = {"rotation", "saddle", "bilinear_sum", "quadratic"}
FAILURES = {Status.ASSUMPTION_VIOLATED, Status.NOT_MONOTONE, Status.DIVERGED}
FAILURES |= {Status.NO_SOLUTION_SUSPECTED}  # a slope that never turns, were it a gradient's

METHODS = ["auto", *sorted(SOLVERS)]


@functools.cache
def _known(name):
    return standard_problem(name, size=SIZES.get(name, 8), seed=1, **OPTIONS.get(name, {}))


def _seen_by(name, method):
    """Return the problem in the form that a method takes: sums for those that sample."""
    samples = method != "auto" and "seed" in {f.name for f in dataclasses.fields(SOLVERS[method])}
    return _known(name).as_sum() if samples else _known(name)


def _expected(name, method):
    known = _known(name)
    refuses = (
        (method in NEEDS_COCOERCIVE and known.kind != "cocoercive")
        or (method in NEEDS_NO_RESOLVENT and known.problem.resolvent is not None)
        or (method in NEEDS_SADDLE and not hasattr(known.problem, "dual_value"))
    )
    if refuses:
        return "refuses"
    return "fails" if method in NEEDS_GRADIENT and name in NO_GRADIENT else "solves"


CELLS = [(name, method) for name in sorted(PROBLEMS) for method in METHODS]


@pytest.mark.parametrize(("name", "method"), [c for c in CELLS if _expected(*c) == "solves"])
def test_method_solves_problem(name, method):
    """Oracles: the known solution, and the residual recomputed from problem and result alone."""
    known = _seen_by(name, method)
    rtol = RTOL.get(name, DEFAULT_RTOL)
    result = solve(known.problem, method, atol=0.0, rtol=rtol, max_iterations=MAX_ITERATIONS)
    assert result.converged, result.message
    assert result.verify(known.problem) == pytest.approx(result.residual, rel=ROUNDING)
    allowed = known.allows(result.value, result.residual)
    assert -ROUNDING <= known.error(result.value) <= allowed * (1 + ROUNDING) + ROUNDING
    assert result.oracle_calls == (
        known.problem.num_components * result.full_evals + result.component_evals
    )


@pytest.mark.parametrize(("name", "method"), [c for c in CELLS if _expected(*c) == "refuses"])
def test_method_refuses_problem_with_a_remedy(name, method):
    """Oracle: the table above; the message names the method and another one that exists."""
    with pytest.raises(ConfigError, match=f"method={method}: ") as refused:
        solve(_seen_by(name, method).problem, method)
    text = str(refused.value)
    assert "\n" not in text
    assert any(f"method={other}" in text for other in METHODS if other != method), text


@pytest.mark.parametrize(("name", "method"), [c for c in CELLS if _expected(*c) == "fails"])
def test_method_reports_what_it_cannot_know_beforehand(name, method):
    """Oracle: the table above; the point that comes back is finite and its residual is honest."""
    known = _known(name)
    result = solve(known.problem, method, atol=1e-9, max_iterations=MAX_ITERATIONS)
    assert result.status in FAILURES
    assert result.verify(known.problem) == pytest.approx(result.residual, rel=ROUNDING)


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_residuals_are_lower_bounds_of_the_certificate_everywhere(name):
    """Oracle: the known solution. What a residual proves holds at random points, not just near it.

    The points are what the resolvent returns, with the element of G that it proves.
    """
    known = _known(name).as_sum()
    problem = known.problem
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 3.0):
        point, normal = _point_with_normal(problem, scale, generator)
        value = problem.full(point)
        residual = float(torch.cat([part.reshape(-1) for part in _sum(value, normal)]).norm())
        assert known.error(point) <= known.allows(point, residual) * (1 + ROUNDING) + ROUNDING


def _point_with_normal(problem, scale, generator):
    parts = problem.start if isinstance(problem.start, tuple) else (problem.start,)
    noisy = [p + scale * torch.randn(p.shape, generator=generator).to(p) for p in parts]
    inside = tuple(noisy) if isinstance(problem.start, tuple) else noisy[0]
    if problem.resolvent is None:
        return inside, None
    moved = problem.resolvent(inside, 0.5)
    return moved, _scaled_difference(inside, moved, 0.5)


def _scaled_difference(before, after, step):
    if isinstance(before, tuple):
        return tuple((b - a) / step for b, a in zip(before, after, strict=True))
    return (before - after) / step


def _sum(value, normal):
    values = value if isinstance(value, tuple) else (value,)
    if normal is None:
        return values
    normals = normal if isinstance(normal, tuple) else (normal,)
    return [v + n for v, n in zip(values, normals, strict=True)]


@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_same_seed_same_run(method):
    """Oracle: the run itself, bit for bit; for methods that sample another seed differs."""
    name = "least_squares_sum" if method not in NEEDS_SADDLE else "matrix_game"
    known = _seen_by(name, method)
    samples = "seed" in {field.name for field in dataclasses.fields(SOLVERS[method])}

    def run(seed):
        options = {"seed": seed} if samples else {}
        return solve(known.problem, method, atol=0.0, max_iterations=20, **options)

    first, again = run(0), run(0)
    assert [tuple(p) for p in first.trace] == [tuple(p) for p in again.trace]
    if samples:
        assert [tuple(p) for p in first.trace] != [tuple(p) for p in run(1).trace]


@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_unknown_options_are_refused(method):
    """Each method names an option that it does not have."""
    with pytest.raises(ConfigError, match="warp"):
        make_solver(method, warp=1)
