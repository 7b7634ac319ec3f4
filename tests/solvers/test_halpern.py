"""Contract of every method of the registry on problems with known solutions."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import SOLVERS, Inclusion, Status, fixed_point, iterate, make_solver, solve

EXACT = 1e-9  # rounding of a few thousand float64 operations of order one
SLOW_TOL = 5e-3  # plain Halpern needs about 2 D L / tol steps
GENERAL = sorted(set(SOLVERS) - {"pdhg"})  # which needs the parts of a saddle point problem
ANCHORED = ("halpern", "halpern_reflected", "halpern_restarted", "halpern_anderson")


def least_squares(rank=6, size=10, seed=0, dtype=torch.float64):
    """Consistent least squares; the zero nearest the origin is the pseudo-inverse solution."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, rank, generator=g, dtype=torch.float64)
    a = a @ torch.randn(rank, size, generator=g, dtype=torch.float64)
    b = a @ torch.randn(size, generator=g, dtype=torch.float64)
    bound = float(torch.linalg.matrix_norm(a, 2)) ** 2
    a, b = a.to(dtype), b.to(dtype)
    problem = Inclusion(
        operator=lambda x: a.T @ (a @ x - b),
        start=torch.zeros(size, dtype=dtype),
        lipschitz_bound=bound,
    )
    return problem, torch.linalg.pinv(a.double()) @ b.double()


def boxed_quadratic():
    """Diagonal quadratic over a box; the solution is the clipped free minimiser."""
    h = torch.linspace(0.5, 4.0, 12, dtype=torch.float64)
    c = torch.linspace(-3.0, 3.0, 12, dtype=torch.float64)
    problem = Inclusion(
        operator=lambda x: h * (x - c),
        start=torch.zeros(12, dtype=torch.float64),
        resolvent=lambda x, step: x.clamp(-1.0, 1.0),
        lipschitz_bound=4.0,
    )
    return problem, c.clamp(-1.0, 1.0)


def rotation(angle=1.0):
    """Rotation of the plane: nonexpansive, fixed point 0, Picard iteration never moves closer."""
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    start = torch.tensor([3.0, 4.0], dtype=torch.float64)
    return turn, fixed_point(lambda x: turn @ x, start)


@pytest.mark.parametrize("method", GENERAL)
def test_solve_returns_the_residual_it_claims(method):
    """Oracle: the residual recomputed from the operator, on a problem that is solvable."""
    problem, _ = least_squares(rank=10)
    result = solve(problem, method, rtol=1e-3, max_iterations=20_000)
    assert result.converged, result.message
    gradient = problem.operator(result.value)
    assert result.residual == pytest.approx(float(gradient.norm()), rel=EXACT)
    assert result.residual <= 1e-3 * float(problem.operator(problem.start).norm()) + 1e-6
    assert len(result.trace) == result.iterations + 1
    assert result.trace[-1].calls <= result.oracle_calls


def test_halpern_converges_to_the_solution_nearest_the_anchor():
    """Oracle: minimum-norm solution of a rank-deficient system by pinv."""
    problem, truth = least_squares(rank=4)
    result = solve(problem, "halpern_restarted", atol=1e-8)
    assert result.converged
    assert float((result.value - truth).norm()) <= 1e-4 * float(truth.norm())


@pytest.mark.parametrize("method", ANCHORED)
def test_solve_handles_an_active_box(method):
    """Oracle: the separable closed form clip(c); the element of F + G is checked by hand."""
    problem, truth = boxed_quadratic()
    result = solve(problem, method, atol=SLOW_TOL)
    assert result.converged, result.message
    # Strong monotonicity 1/2: |v - u*| <= residual / 0.5.
    assert float((result.value - truth).norm()) <= 2 * result.residual + EXACT


def test_halpern_meets_its_rate_on_a_rotation():
    """Oracle: the theorem |u_k - T u_k| <= 2 D / (k+1) at every k; Picard keeps its norm."""
    turn, problem = rotation()
    seen = []
    iterate(
        problem,
        make_solver("halpern"),
        atol=0.0,
        max_iterations=1000,
        callback=lambda state, oracle: seen.append(
            float((state.iterate - turn @ state.iterate).norm())
        ),
    )
    distance = float(problem.start.norm())
    assert len(seen) == 1001
    assert all(gap <= 2 * distance / (k + 1) * (1 + EXACT) for k, gap in enumerate(seen))
    picard = problem.start
    for _ in range(100):
        picard = turn @ picard
    assert float(picard.norm()) == pytest.approx(distance)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["halpern", "halpern_reflected"])
def test_halpern_meets_its_rate_with_a_resolvent(seed, method):
    """Oracle: the theorem for T = forward-backward map, on random boxed least squares."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(20, 15, generator=g, dtype=torch.float64)
    b = torch.randn(20, generator=g, dtype=torch.float64)
    problem = Inclusion(
        operator=lambda x: a.T @ (a @ x - b),
        start=torch.full((15,), 2.0, dtype=torch.float64),
        resolvent=lambda x, step: x.clamp(0.0, 0.3),
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)) ** 2,
    )
    truth = solve(problem, "halpern_restarted", atol=1e-10, max_iterations=200_000).value
    distance = float((problem.start - truth).norm())
    seen = []
    iterate(
        problem,
        make_solver(method),
        atol=0.0,
        max_iterations=300,
        callback=lambda state, oracle: seen.append(float((state.iterate - state.mapped).norm())),
    )
    assert all(gap <= 2 * distance / (k + 1) + 1e-7 for k, gap in enumerate(seen))


def test_projection_fixed_point_is_the_projection_of_the_anchor():
    """Oracle: closed-form projection on a line, the intersection of two half-spaces' borders."""
    normals = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)

    def project_both(x):
        for normal in normals:
            x = x - normal * (normal @ x) / (normal @ normal)
        return x

    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    problem = fixed_point(project_both, start)
    result = solve(problem, "halpern", atol=0.0, max_iterations=2000)
    assert torch.allclose(result.value, torch.tensor([0.0, 0.0, 3.0]).double(), atol=SLOW_TOL)


@pytest.mark.parametrize("method", ["halpern", "halpern_restarted", "halpern_anderson"])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_wrong_lipschitz_constant_costs_time_but_not_correctness(method, factor):
    """Oracle: the residual of the known problem; L ten times too small is raised on the way."""
    problem, _ = least_squares(rank=10)
    true = problem.lipschitz_bound
    wrong = Inclusion(operator=problem.operator, start=problem.start, lipschitz_bound=factor * true)
    result = solve(wrong, method, rtol=1e-2)
    assert result.converged
    assert torch.isfinite(result.value).all()
    if factor < 1 and method == "halpern":
        assert result.lipschitz > wrong.lipschitz_bound


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_keeps_shape_and_dtype(shape, dtype):
    """Oracle: F(u) = u - 1 has the zero 1 in any shape."""
    problem = Inclusion(operator=lambda u: u - 1, start=torch.zeros(shape, dtype=dtype))
    for method in GENERAL:
        result = solve(problem, method, atol=SLOW_TOL)
        assert result.value.shape == shape
        assert result.value.dtype == dtype
        assert torch.allclose(result.value, torch.ones(shape, dtype=dtype), atol=SLOW_TOL)


@pytest.mark.parametrize("method", ANCHORED)
def test_refuses_operators_that_theory_does_not_cover(method):
    """A skew operator is not cocoercive, -u is not monotone, NaN is nothing at all."""
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = torch.ones(2, dtype=torch.float64)
    result = solve(Inclusion(operator=lambda u: skew @ u, start=start), method)
    assert result.status is Status.ASSUMPTION_VIOLATED
    assert solve(Inclusion(operator=lambda u: -u, start=start), method).status is (
        Status.NOT_MONOTONE
    )
    with pytest.raises(ConfigError, match="not finite"):
        solve(Inclusion(operator=lambda u: u * math.nan, start=start), method)
    with pytest.raises(ConfigError, match="declared not to be one"):
        solve(Inclusion(operator=lambda u: u, start=start, cocoercive=False), method)


@pytest.mark.parametrize("method", ANCHORED)
def test_operator_that_turns_nan_ends_with_a_finite_point(method):
    """Oracle: the start is the only finite point, so it must be returned."""
    start = torch.ones(2, dtype=torch.float64)

    def operator(u):
        return torch.ones_like(u) if torch.equal(u, start) else u * math.nan

    problem = Inclusion(operator=operator, start=start, lipschitz_bound=1.0)
    result = solve(problem, method)
    assert result.status is Status.NONFINITE
    assert torch.equal(result.value, start)


@pytest.mark.parametrize("method", GENERAL)
def test_start_at_the_solution_costs_nothing(method):
    """Oracle: zero iterations and at most two evaluations when the residual is already 0."""
    start = torch.zeros(3, dtype=torch.float64)
    problem = Inclusion(operator=lambda u: u, start=start, lipschitz_bound=1.0)
    result = solve(problem, method)
    assert result.converged
    assert result.iterations == 0
    assert result.oracle_calls <= 2


@pytest.mark.parametrize("method", GENERAL)
def test_solve_is_deterministic(method):
    """Oracle: the same run twice, bit for bit."""
    problem, _ = least_squares()
    first, second = (solve(problem, method, max_iterations=40, atol=0.0) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert first.trace == second.trace


def test_restarts_turn_the_rate_linear():
    """Oracle: on a strongly monotone problem the restarted calls grow like log(1/tol)."""
    problem, _ = boxed_quadratic()
    calls = [solve(problem, "halpern_restarted", atol=tol).oracle_calls for tol in (1e-4, 1e-8)]
    plain = solve(problem, "halpern", atol=1e-4, max_iterations=5 * calls[0])
    assert calls[1] < 4 * calls[0]
    assert plain.status is Status.MAX_ITERATIONS


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("halpern", {"step_scale": 2.5}),
        ("halpern", {"step_scale": -1.0}),
        ("halpern_restarted", {"restart_factor": 1.0}),
        ("halpern_anderson", {"memory": 0}),
        ("halpern_anderson", {"depth": 3}),
        ("lbfgs", {"memory": 0}),
        ("steepest", {}),
    ],
)
def test_make_solver_refuses_impossible_settings(method, options):
    """Each setting is outside what the method's docstring allows."""
    with pytest.raises(ConfigError):
        make_solver(method, **options)
