"""New weights for kept components."""

import itertools

import pytest
import torch

from common.errors import ConfigError
from compress.compensate import METHODS, clip_spectrum, compensate, reconstruction_error
from compress.targets import Problem, block_indices

EXACT = 1e-8
CAP_TOLERANCE = 1e-9
OPTIMALITY = 3e-3
"""Relative excess over the optimum that the stopping rule of the capped fit admits."""


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


@pytest.mark.parametrize("method", ["lsq", "delta"])
def test_one_factor_per_weight_is_least_squares(make_problem, method):
    """The paper's compensation (a scalar per input and output) is ordinary least squares."""
    problem, _ = make_problem("low_rank")
    gone = torch.arange(1, 32, 2)
    new = compensate(problem, KEPT, method)
    for output in range(4):
        w = problem.weight_IO[:, output]
        q = problem.gram_II * torch.outer(w, w)
        factors = 1 + torch.linalg.solve(q[KEPT][:, KEPT], q[KEPT][:, gone].sum(1))
        torch.testing.assert_close(new[:, output], factors * w[KEPT], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_factors_cannot_revive_a_zero_weight(make_problem, ridge):
    """Least squares for outputs without zeros; for the first, a regression on the other inputs."""
    problem, _ = make_problem("low_rank", ridge=ridge)
    problem.weight_IO[KEPT[:3], 0] = 0
    new = compensate(problem, KEPT, "delta")
    full = compensate(problem, KEPT, "lsq")
    torch.testing.assert_close(new[:, 1:], full[:, 1:], rtol=EXACT, atol=EXACT)
    assert bool((new[:3, 0] == 0).all())
    smaller = compensate(problem, KEPT[3:], "lsq")[:, 0]
    torch.testing.assert_close(new[3:, 0], smaller, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("unit", [2, 4])
def test_block_factors_are_the_best_multiples_of_parts(make_problem, unit):
    """Oracle: regression of each output (all together for scalar) on the components' parts."""
    problem, _ = make_problem("low_rank", seed=6, unit=unit, outputs=5)
    kept_C = torch.arange(0, 32 // unit, 2)
    kept_K = block_indices(kept_C, unit)
    rows = torch.linalg.cholesky(problem.gram_II).T
    weight = problem.weight_IO
    parts = torch.stack([rows[:, i : i + unit] @ weight[i : i + unit] for i in range(0, 32, unit)])
    target = parts.sum(0)
    scalar = torch.linalg.lstsq(parts[kept_C].flatten(1).T, target.flatten()).solution
    expected = weight[kept_K] * scalar.repeat_interleave(unit)[:, None]
    torch.testing.assert_close(compensate(problem, kept_K, "scalar"), expected)
    new = compensate(problem, kept_K, "delta")
    for output in range(5):
        factors = torch.linalg.lstsq(parts[kept_C, :, output].T, target[:, output]).solution
        expected = weight[kept_K, output] * factors.repeat_interleave(unit)
        torch.testing.assert_close(new[:, output], expected)


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_errors_are_ordered_by_freedom(make_problem, unit, ridge):
    """Least squares <= factors per output <= shared factors <= nothing; a subset is worse."""
    problem, _ = make_problem("low_rank", seed=2, unit=unit, ridge=ridge)
    kept_K = block_indices(torch.arange(0, problem.components, 2), unit)
    gram = problem.gram_II + problem.penalty * torch.eye(32, dtype=torch.float64)
    penalised = Problem(gram_II=gram, weight_IO=problem.weight_IO, unit=unit, ridge=0.0)
    errors = [
        reconstruction_error(penalised, kept_K, compensate(problem, kept_K, method))
        for method in ("lsq", "delta", "scalar", "none")
    ]
    assert all(low <= high * (1 + EXACT) for low, high in itertools.pairwise(errors))
    assert (errors[0] < errors[1]) == (unit > 1)
    assert errors[1] < errors[2] < errors[3] <= penalised.energy
    smaller = compensate(problem, kept_K[:8], "lsq")
    assert reconstruction_error(penalised, kept_K[:8], smaller) >= errors[0]


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


@pytest.mark.parametrize("kind", ["low_rank", "clusters", "free"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("outputs", [8, 48])
def test_capped_solution_obeys_the_cap_and_is_optimal(make_problem, kind, share, outputs):
    """Oracle: a dual point, whose value no error under the cap can undercut (lower bound)."""
    problem, _ = make_problem(kind, seed=4, outputs=outputs)
    free = compensate(problem, KEPT, "lsq")
    cap = share * norm(free)
    new = compensate(problem, KEPT, "lsq_capped", cap=cap)
    assert norm(new) <= cap * (1 + CAP_TOLERANCE)
    error = reconstruction_error(problem, KEPT, new)
    gram = problem.gram_II[KEPT][:, KEPT]
    # Any matrix Z: min over the ball >= -cap |Z|_* + min over all V of error(V) + <Z, V>.
    pull = 2 * gram @ (free - new)
    lowest = free - torch.linalg.solve(gram, pull) / 2
    bound = reconstruction_error(problem, KEPT, lowest) + float((pull * lowest).sum())
    bound -= cap * float(torch.linalg.matrix_norm(pull, "nuc"))
    assert error <= bound + OPTIMALITY * error


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
