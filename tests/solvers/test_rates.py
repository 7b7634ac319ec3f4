"""Every proved rate of the deterministic methods, at every iteration (spec halpern_solvers 4.1)."""

import math

import pytest
import torch

from solvers import Inclusion, iterate, make_solver

ITERATIONS = 500
ROUNDING = 1e-9


def bilinear(seed=0, half=30):
    """An invertible coupling with singular values from 1 down to 1e-3; L = 1, the zero is known."""
    g = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(half, half, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(half, half, generator=g, dtype=torch.float64))
    a = left * torch.logspace(0, -3, half, dtype=torch.float64) @ right
    truth = torch.randn(2 * half, generator=g, dtype=torch.float64)

    def operator(z):
        x, y = (z - truth).split(half)
        return torch.cat((a @ y, -(a.T @ x)))

    start = torch.zeros(2 * half, dtype=torch.float64)
    problem = Inclusion(operator=operator, start=start, lipschitz_bound=1.0, cocoercive=False)
    return problem, truth


def least_squares(seed=0, size=60):
    """The gradient of an ill-conditioned quadratic; L = 1, the zero is known."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    h = basis * torch.logspace(0, -5, size, dtype=torch.float64) @ basis.T
    truth = torch.randn(size, generator=g, dtype=torch.float64)
    start = torch.zeros(size, dtype=torch.float64)
    return Inclusion(operator=lambda z: h @ (z - truth), start=start, lipschitz_bound=1.0), truth


def curve(problem, method, measure, **options):
    """Return a measure of the state at every iteration of a run without restarts."""
    seen = []
    iterate(
        problem,
        make_solver(method, **options),
        atol=0.0,
        max_iterations=ITERATIONS,
        callback=lambda state, oracle: seen.append(measure(state)),
    )
    assert len(seen) == ITERATIONS + 1
    return seen


# Problem, method, options, k -> factor of the residual, bound in units of L D.
RATES = {
    "feg": (bilinear, "feg", {"restart_factor": 0.0}, lambda k: k, 2.0),
    "eag_proved": (
        bilinear,
        "eag",
        {"restart_factor": 0.0, "step_scale": 1 / 8},
        lambda k: k + 1,
        math.sqrt(260),
    ),
    "eag_v": (
        bilinear,
        "eag_v",
        {"restart_factor": 0.0},
        lambda k: math.sqrt((k + 1) * (k + 2)),
        math.sqrt(27),
    ),
    "halpern_two": (least_squares, "halpern", {}, lambda k: k + 1, 1.0),
    "halpern_one": (least_squares, "halpern", {"step_scale": 1.0}, lambda k: k + 1, 2.0),
}


def scaled_maximum(name, seed=0):
    """Return ``max_k factor(k) |F(z_k)| / (L D)``."""
    build, method, options, factor, _ = RATES[name]
    problem, truth = build(seed)
    residuals = curve(problem, method, lambda state: state.residual, **options)
    scale = problem.lipschitz_bound * float(truth.norm())
    return max(factor(k) * residual / scale for k, residual in enumerate(residuals))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(RATES))
def test_residual_stays_below_its_proved_rate(name, seed):
    """Oracle: the theorem's constant; and the rate is not met by a margin that proves nothing."""
    largest, bound = scaled_maximum(name, seed), RATES[name][-1]
    assert largest <= bound * (1 + ROUNDING)
    assert largest >= 0.1 * bound


@pytest.mark.parametrize(("reflect", "bound"), [(False, 2.0), (True, 1.0)])
def test_resolvent_iteration_stays_below_its_proved_rate(reflect, bound):
    """Oracle: (k+1) |u_k - J(u_k)| <= 2 D, or D when reflected, with accurate resolvents."""
    problem, truth = bilinear()
    seen = []
    iterate(
        problem,
        make_solver(
            "halpern_resolvent", reflect=reflect, step_scale=2.0, accuracy=1e-4, restart_factor=0.0
        ),
        atol=0.0,
        max_iterations=40,
        callback=lambda state, oracle: seen.append(state.gap),
    )
    # The state after step k holds the gap at u_{k-1}.
    largest = max(k * gap for k, gap in enumerate(seen) if k) / float(truth.norm())
    assert 0.1 * bound <= largest <= bound * (1 + 1e-3)


@pytest.mark.parametrize("step_scale", [0.1, 0.3, 0.618])
def test_steps_of_the_varying_method_fall_to_a_positive_limit(step_scale):
    """Oracle: the recursion run by itself in float64; 0.618 ends at 0.4366 (spec 4.1)."""
    problem, _ = bilinear()
    options = {"restart_factor": 0.0, "step_scale": step_scale}
    scales = curve(problem, "eag_v", lambda state: state.scale, **options)
    alpha = step_scale
    for k, scale in enumerate(scales):
        assert scale == pytest.approx(alpha, rel=1e-12)
        alpha *= 1 - alpha**2 / ((k + 1) * (k + 3) * (1 - alpha**2))
    if step_scale == 0.618:
        assert scales[-1] == pytest.approx(0.4366, abs=2e-4)


@pytest.mark.parametrize("method", ["feg", "eag", "eag_v", "halpern_resolvent"])
def test_restarts_make_the_rate_linear(method):
    """Oracle: on an invertible coupling the work grows with log(1/tol), not with 1/tol."""
    g = torch.Generator().manual_seed(0)
    a = torch.eye(10).double() + 0.2 * torch.randn(10, 10, generator=g, dtype=torch.float64)
    problem = Inclusion(
        operator=lambda z: torch.cat((a @ (z[10:] - 1), -(a.T @ (z[:10] + 1)))),
        start=torch.zeros(20, dtype=torch.float64),
        lipschitz_bound=float(torch.linalg.matrix_norm(a, 2)),
    )
    evals = [
        iterate(problem, make_solver(method), atol=tol).full_evals for tol in (1e-2, 1e-5, 1e-8)
    ]
    first, second = evals[1] - evals[0], evals[2] - evals[1]
    assert second <= 1.3 * first + 20
