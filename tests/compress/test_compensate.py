"""New weights for kept components."""

import pytest
import torch

from common.errors import ConfigError
from compress.compensate import METHODS, clip_spectrum, compensate, reconstruction_error
from compress.targets import Problem

EXACT = 1e-8
CAP_TOLERANCE = 1e-9
OPTIMALITY = 2e-3
"""Relative excess of the projected gradient over the optimum, on its stopping rule."""


def norm(matrix: torch.Tensor) -> float:
    """Return the largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, 2))


KEPT = torch.arange(0, 32, 2)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_returns_the_weights_themselves(make_problem, method):
    """Bit for bit, and with an error of exactly 0."""
    problem, _ = make_problem("clusters", ridge=1e-3)
    everything = torch.arange(32)
    new = compensate(problem, everything, method, cap=0.1)
    assert torch.equal(new, problem.weight_IO)
    assert reconstruction_error(problem, everything, new) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cap", [0.1, float("inf")])
def test_a_silent_layer_keeps_its_weights_under_the_cap(make_problem, method, cap):
    """No activation at all: nothing to fit, so the originals stay, clipped where a cap asks."""
    problem, _ = make_problem("free")
    silent = Problem(gram_II=torch.zeros_like(problem.gram_II), weight_IO=problem.weight_IO)
    expected = problem.weight_IO[KEPT]
    if method == "lsq_capped":
        expected = clip_spectrum(expected, cap)
    assert torch.equal(compensate(silent, KEPT, method, cap=cap), expected)


@pytest.mark.parametrize("kind", ["free", "low_rank", "clusters"])
def test_least_squares_equals_the_regression_on_data(make_problem, kind):
    """Oracle: torch.linalg.lstsq on rows with exactly this Gram matrix."""
    problem, _ = make_problem(kind)
    rows = torch.linalg.cholesky(problem.gram_II).T
    expected = torch.linalg.lstsq(rows[:, KEPT], rows @ problem.weight_IO).solution
    new = compensate(problem, KEPT, "lsq")
    torch.testing.assert_close(new, expected, rtol=EXACT, atol=EXACT)


def test_one_factor_per_weight_is_least_squares(make_problem):
    """The paper's compensation (a scalar per input and output) is ordinary least squares."""
    problem, _ = make_problem("low_rank")
    gone = torch.arange(1, 32, 2)
    new = compensate(problem, KEPT, "lsq")
    for output in range(4):
        w = problem.weight_IO[:, output]
        q = problem.gram_II * torch.outer(w, w)
        factors = 1 + torch.linalg.solve(q[KEPT][:, KEPT], q[KEPT][:, gone].sum(1))
        torch.testing.assert_close(new[:, output], factors * w[KEPT], rtol=EXACT, atol=EXACT)


def test_errors_are_ordered_by_freedom(make_problem):
    """Full least squares <= capped <= one scalar per component or nothing; a subset is worse."""
    problem, _ = make_problem("low_rank", seed=2)
    q = problem.gram_II * (problem.weight_IO @ problem.weight_IO.T)
    scale = torch.linalg.solve(q[KEPT][:, KEPT], q[KEPT].sum(1))
    scalar = scale[:, None] * problem.weight_IO[KEPT]
    free = compensate(problem, KEPT, "lsq")
    errors = [
        reconstruction_error(problem, KEPT, new)
        for new in (free, scalar, compensate(problem, KEPT, "none"))
    ]
    assert errors == sorted(errors)
    assert 0 <= errors[0] <= errors[-1] <= problem.energy
    smaller = compensate(problem, KEPT[:8], "lsq")
    assert reconstruction_error(problem, KEPT[:8], smaller) >= errors[0]


def test_a_large_ridge_means_no_change(make_problem):
    """The ridge pulls toward the original weights, not toward zero."""
    problem, _ = make_problem("low_rank", ridge=0.3)
    stiff = Problem(gram_II=problem.gram_II, weight_IO=problem.weight_IO, ridge=0.0)
    moves = [
        float((compensate(p, KEPT, "lsq") - p.weight_IO[KEPT]).norm()) for p in (problem, stiff)
    ]
    assert 0 < moves[0] < moves[1]


@pytest.mark.parametrize("shape", [(20, 6), (6, 20), (9, 9)])
def test_clipping_is_the_projection_onto_the_ball(shape):
    """Oracle: singular values clipped in a full decomposition."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    cap = float(values[2])
    expected = left @ torch.diag(values.clamp(max=cap)) @ right
    torch.testing.assert_close(clip_spectrum(matrix, cap), expected, rtol=EXACT, atol=EXACT)
    assert clip_spectrum(matrix, norm(matrix) * 10) is matrix


@pytest.mark.parametrize("kind", ["low_rank", "clusters"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_capped_solution_obeys_the_cap_and_is_optimal(make_problem, kind, share):
    """Optimality oracle: a projected gradient step does not lower the error any further."""
    problem, _ = make_problem(kind, seed=4)
    cap = share * norm(compensate(problem, KEPT, "lsq"))
    new = compensate(problem, KEPT, "lsq_capped", cap=cap)
    assert norm(new) <= cap * (1 + CAP_TOLERANCE)
    error = reconstruction_error(problem, KEPT, new)
    gram = problem.gram_II[KEPT][:, KEPT]
    target = problem.gram_II[KEPT] @ problem.weight_IO
    polished = new
    for _ in range(1000):
        step = (gram @ polished - target) / norm(gram)
        polished = clip_spectrum(polished - step, cap)
    best = reconstruction_error(problem, KEPT, polished)
    assert best <= error <= (1 + OPTIMALITY) * best


def test_a_cap_that_does_not_bind_reproduces_least_squares(make_problem):
    """An infinite cap, and one just above the free solution's norm."""
    problem, _ = make_problem("clusters", ridge=1e-6)
    free = compensate(problem, KEPT, "lsq")
    for cap in (float("inf"), norm(free) * 1.001):
        assert torch.equal(compensate(problem, KEPT, "lsq_capped", cap=cap), free)


def test_unknown_method_lists_the_known_ones(make_problem):
    """The message is the documentation."""
    with pytest.raises(ConfigError, match="expected one of none, scalar, delta, lsq"):
        compensate(make_problem("free")[0], KEPT, "magic")
