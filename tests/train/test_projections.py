"""Weight constraints: the SVD, closed forms and the published coupling table are the oracles."""

import logging

import pytest
import torch

from common.errors import ConfigError, ConvergenceError, ShapeError
from train.projections import PROJECTIONS, caps, power_vectors, project, soft_cap_strength
from train.projections.caps import norm_bounds
from train.projections.power import top_singular
from train.projections.step import FLOAT32_MARGIN, STORAGE_MARGIN, Step

CAPS = [name for name, p in PROJECTIONS.items() if p.caps and name != "row_clip"]
POWER = [name for name, p in PROJECTIONS.items() if p.uses_vectors]
SHAPES = [(24, 40), (40, 24), (32, 32), (3, 16, 48)]
# float32 rounding on top of a cap.
ROUNDING = 1e-5
# alpha at w_max = 1 for update norms, specification section 2.2 (six digits).
PUBLISHED_ALPHA = {0.01: 0.058025, 0.05: 0.122439, 0.1: 0.158864, 0.2: 0.188631, 0.3: 0.195277}
# Largest distance of the hard cap's quintics from min(1, sigma), specification section 2.1.
HARD_CAP_ERROR = 0.034
# Share of its maximum that the six-step polynomial leaves to singular values of 1 / 100.
STIEFEL_RANGE = 0.995
# Median of the largest norm after a cap, relative to w_max: a constraint must not crush weights.
NOT_CRUSHED = 0.93


def rms_norm(w):
    """RMS->RMS norm sqrt(I/O) sigma_1 by SVD in float64."""
    return (w.shape[-1] / w.shape[-2]) ** 0.5 * torch.linalg.matrix_norm(w.double(), 2)


def with_values(shape, sigma, seed=0):
    """Random singular vectors around the given singular values, in RMS->RMS units, float64."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    return (shape[-2] / shape[-1]) ** 0.5 * (u * sigma) @ vt


def near_cap(shape, w_max, excess, seed=0):
    """Random matrices whose singular values are spread up to ``w_max + excess``."""
    sigma = torch.linspace(1.0, 0.1, min(shape[-2:]), dtype=torch.float64)
    return with_values(shape, sigma * (w_max + excess), seed).float()


@pytest.mark.parametrize(("update", "alpha"), PUBLISHED_ALPHA.items())
def test_soft_cap_strength_matches_the_published_values(update, alpha):
    """Oracle: table of specification section 2.2."""
    assert soft_cap_strength(1.0, update) == pytest.approx(alpha, abs=5.1e-7)


def test_soft_cap_strength_scales_with_the_cap():
    """Oracle: published value at w_max = 6 and the scaling alpha(c w, c u) = alpha(w, u) / c^2."""
    assert soft_cap_strength(6.0, 0.1) == pytest.approx(0.002065, abs=5.1e-7)
    assert soft_cap_strength(3.0, 0.3) == pytest.approx(soft_cap_strength(1.0, 0.1) / 9, rel=1e-12)


@pytest.mark.parametrize("update", [1e-8, 1e-4, 0.05, 0.3])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_soft_cap_strength_sends_the_largest_value_to_the_cap(update, decay):
    """Oracle: p2(p1(k)) = w_max in float64, and monotone below k, so nothing ends above."""
    alpha, largest = soft_cap_strength(1.5, update, decay), 1.5 * (1 - decay) + update
    x = torch.linspace(0, largest, 10_001, dtype=torch.float64)
    y = x - alpha * x**3
    z = y + alpha * y**3
    assert float(z.max()) <= 1.5 * (1 + 1e-13)
    assert bool((z.diff() >= 0).all())
    if alpha > 0:
        assert float(z[-1]) == pytest.approx(1.5, rel=1e-12)
    else:
        assert largest <= 1.5


def test_soft_cap_strength_refuses_the_non_monotone_range():
    """Error names the update, the cap and the remedy."""
    with pytest.raises(ConfigError, match=r"update_norm=0\.31.*exact_cap"):
        soft_cap_strength(1.0, 0.31)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_cap_matches_the_scalar_polynomial_on_singular_values(shape):
    """Oracle: SVD in float64 with the two cubics on the singular values."""
    w = near_cap(shape, 1.2, 0.1).double()
    scale = (shape[-2] / shape[-1]) ** 0.5
    alpha = soft_cap_strength(1.2, 0.1)
    u, sigma, vt = torch.linalg.svd(w / scale, full_matrices=False)
    y = sigma - alpha * sigma**3
    expected = scale * (u * (y + alpha * y**3)[..., None, :]) @ vt
    got = project(w, "soft_cap", 1.2, largest=1.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * FLOAT32_MARGIN)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_cap_matches_the_clamped_svd(shape):
    """Oracle: SVD in float64 with clamped singular values."""
    w = torch.randn(shape)
    scale = (shape[-2] / shape[-1]) ** 0.5
    u, sigma, vt = torch.linalg.svd(w.double() / scale, full_matrices=False)
    expected = scale * (u * sigma.clamp_max(0.7)[..., None, :]) @ vt
    torch.testing.assert_close(
        project(w, "exact_cap", 0.7).double(), expected, rtol=0, atol=ROUNDING
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (2, 32, 32)])
@pytest.mark.parametrize("w_max", [0.5, 3.0])
def test_hard_cap_is_near_the_clamped_svd_and_never_above(shape, w_max):
    """Oracle: SVD in float64, min(w_max, sigma) within the published error; scales with w_max."""
    sigma = torch.linspace(0.0, 2.8, 24 if shape[0] != 2 else 32, dtype=torch.float64) * w_max
    w = with_values(shape, sigma)
    scale = (shape[-2] / shape[-1]) ** 0.5
    got = torch.linalg.svdvals(project(w, "hard_cap", w_max, largest=2.8 * w_max)) / scale
    expected = sigma.clamp_max(w_max).flip(0)
    # The cap aims below w_max by its overshoot, which shifts the published curve by as much.
    error = (HARD_CAP_ERROR + caps.HARD_CAP_OVERSHOOT - 1) * w_max
    assert float((got - expected).abs().max()) <= error
    assert float(got.max()) <= w_max


def test_hard_cap_overshoot_and_range_are_those_of_the_quintics():
    """Oracle: scalar evaluation in float64; beyond the range the quintics do break."""
    x = torch.linspace(0, caps.HARD_CAP_RANGE, 300_001, dtype=torch.float64)
    top = float(_hard_cap_scalar(x).max())
    assert top <= caps.HARD_CAP_OVERSHOOT <= top + 2e-5
    assert abs(float(_hard_cap_scalar(torch.tensor([4.0]))) - 1) > 1
    values = torch.tensor([0.5, 2.0])
    matrix = caps.hard_cap(torch.diag(values)[None], Step(largest=(2.0,), margin=0.0))[0]
    expected = _hard_cap_scalar(values * caps.HARD_CAP_OVERSHOOT) / caps.HARD_CAP_OVERSHOOT
    torch.testing.assert_close(matrix.diagonal(), expected, rtol=ROUNDING, atol=0)


def _hard_cap_scalar(x):
    for a, b, c in caps._HARD_CAP:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_stiefel_matches_the_polar_factor(shape):
    """Oracle: SVD in float64 with every singular value w_max."""
    sigma = torch.linspace(1.0, 0.1, min(shape[-2:]), dtype=torch.float64)
    w = with_values(shape, sigma)
    u, _, vt = torch.linalg.svd(w, full_matrices=False)
    expected = 2.5 * (shape[-2] / shape[-1]) ** 0.5 * u @ vt
    got = project(w.float(), "stiefel", 2.5).double()
    assert float(torch.linalg.matrix_norm(got - expected, 2).max()) <= (
        (1 - STIEFEL_RANGE) * torch.linalg.matrix_norm(expected, 2).max()
    )


@pytest.mark.parametrize("kind", CAPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_max", [0.9, 4.0])
def test_cap_contract(kind, shape, dtype, arithmetic, w_max):
    """Property of every cap: held by SVD, not crushed, shape and dtype kept, input untouched."""
    w = near_cap(shape, w_max, 0.12 * w_max).to(dtype)
    before = w.clone()
    got = project(w, kind, w_max, largest=1.121 * w_max, dtype=arithmetic)
    assert got.shape == w.shape
    assert got.dtype == dtype
    assert torch.equal(w, before)
    norms = rms_norm(got) / w_max
    assert float(norms.max()) <= 1
    assert float(norms.median()) >= NOT_CRUSHED


@pytest.mark.parametrize("kind", ["soft_cap", "exact_cap", "spectral_normalize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_are_kept(kind, dtype):
    """Property of the constraints that only cut: far below the cap nothing happens."""
    tiny = (1e-3 * near_cap((24, 40), 0.9, 0.1)).to(dtype)
    got = project(tiny, kind, 0.9, largest=1.0)
    torch.testing.assert_close(got, tiny, rtol=0.01, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in PROJECTIONS if k != "none"])
def test_scaling_weight_and_cap_together_scales_the_result(kind):
    """Property: the methods know no other length than w_max (released code: norm 1 for some)."""
    w = near_cap((24, 40), 1.0, 0.2)
    one = project(w, kind, 1.0, largest=1.2)
    four = project(4 * w, kind, 4.0, largest=4.8)
    torch.testing.assert_close(four, 4 * one, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_stack_with_own_caps_equals_one_by_one(kind):
    """Oracle: the same function on each matrix with its own cap and bound."""
    stack = torch.stack([near_cap((12, 20), c, 0.2 * c, seed) for seed, c in enumerate((1, 2, 3))])
    maxima, largest = [1.0, 2.0, 3.5], [1.25, 2.45, 3.9]
    got = project(stack, kind, maxima, largest=largest)
    for w, w_max, k, together in zip(stack, maxima, largest, got, strict=True):
        alone = project(w, kind, w_max, largest=k)
        torch.testing.assert_close(together, alone, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(kind, shape, dtype):
    """Oracle: closed form; no division by a zero norm."""
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(project(zero, kind, 1.0, largest=1.1, dtype=dtype), zero)


@pytest.mark.parametrize("kind", ["none", "exact_cap", "spectral_normalize", "row_clip"])
def test_idempotent(kind):
    """Property: a second application changes nothing beyond rounding."""
    w = near_cap((24, 40), 1.0, 0.5)
    once = project(w, kind, 0.8, power_iters=400)
    twice = project(once, kind, 0.8, power_iters=400)
    torch.testing.assert_close(twice, once, rtol=ROUNDING, atol=ROUNDING)


def test_stiefel_is_idempotent_within_its_range():
    """Property: a second application moves values within the polynomial's range of outputs."""
    once = project(near_cap((24, 40), 1.0, 0.5), "stiefel", 0.8)
    change = torch.linalg.matrix_norm(project(once, "stiefel", 0.8) - once, 2)
    assert float(change) <= (1 - STIEFEL_RANGE) * float(torch.linalg.matrix_norm(once, 2))


def test_exact_cap_returns_matrices_below_the_cap_bit_for_bit():
    """Property: no slow drift by rounding where there is nothing to cap."""
    stack = torch.stack([near_cap((12, 20), 0.9, 0.0), near_cap((12, 20), 1.0, 0.3)])
    got = caps.exact_cap(stack * (20 / 12) ** 0.5, Step(largest=(None, None)))
    assert torch.equal(got[0], stack[0] * (20 / 12) ** 0.5)
    assert not torch.equal(got[1], stack[1] * (20 / 12) ** 0.5)


@pytest.mark.parametrize(("kind", "largest"), [("soft_cap", 1.9), ("hard_cap", 3.5)])
def test_caps_fall_back_to_the_exact_cap_with_one_warning(kind, largest, caplog, monkeypatch):
    """Oracle: the exact cap, for the matrices beyond the range alone; one log line in all."""
    monkeypatch.setattr(caps, "_warned", set())
    far, near = near_cap((24, 40), largest, 0.0), near_cap((24, 40), 1.0, 0.1)
    stack = torch.stack([far, near])
    with caplog.at_level(logging.WARNING):
        got = project(stack, kind, 1.0, largest=[largest, 1.1])
        project(stack, kind, 1.0, largest=[largest, 1.1])
    torch.testing.assert_close(got[0], project(far, "exact_cap", 1.0))
    torch.testing.assert_close(got[1], project(near, kind, 1.0, largest=1.1))
    assert len(caplog.records) == 1
    assert "exact cap" in caplog.text


@pytest.mark.parametrize("scale", [0.1, 2.0, 2.9, 3.5, 50.0])
def test_hard_cap_measures_what_it_is_not_told(scale):
    """Oracle: SVD; an unknown norm, as under AdamW, never leaves the range of the quintics."""
    w = near_cap((24, 40), scale, 0.0)
    assert float(rms_norm(project(w, "hard_cap", 1.0))) <= 1


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 64, 16), (1, 7, 7)])
def test_norm_bounds_are_above_the_norm_and_not_far(shape):
    """Oracle: SVD in float64, and the factor M^(1/32) of the docstring."""
    w = torch.randn(shape)
    exact = torch.linalg.matrix_norm(w.double(), 2)
    bounds = torch.tensor(norm_bounds(w), dtype=torch.float64)
    assert bool((bounds >= exact * (1 - ROUNDING)).all())
    assert bool((bounds <= exact * min(shape[-2:]) ** (1 / 32) * (1 + ROUNDING)).all())


def test_soft_cap_without_a_bound_is_an_error():
    """The coupling cannot be guessed."""
    with pytest.raises(ConfigError, match="largest"):
        project(torch.ones(2, 2), "soft_cap", 1.0)


def test_exact_cap_of_a_diverged_weight_says_so():
    """One line instead of a traceback of the linear algebra library."""
    with pytest.raises(ConvergenceError, match=r"lower optim\.lr"):
        project(torch.full((3, 3), float("nan")), "exact_cap", 1.0)


def test_spectral_normalize_divides_by_the_norm_it_finds():
    """Oracle: SVD; a gap in the spectrum lets power iteration converge."""
    w = near_cap((24, 24), 4.0, 0.0)
    torch.testing.assert_close(project(w, "spectral_normalize", 2.0, power_iters=300), w / 2)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_spectral_hammer_sets_the_largest_value_both_ways(shape):
    """Oracle: SVD in float64: the first value becomes w_max, also from below, the rest stays."""
    for top in (3.0, 0.5):
        sigma = torch.tensor([top, *[0.3] * 23], dtype=torch.float64)
        got = project(with_values(shape, sigma), "spectral_hammer", 1.2, power_iters=100)
        values = torch.linalg.svdvals(got) / (shape[0] / shape[1]) ** 0.5
        expected = torch.tensor([1.2, *[0.3] * 23], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=0, atol=ROUNDING)
        again = project(got, "spectral_hammer", 1.2, power_iters=100)
        torch.testing.assert_close(again, got, rtol=0, atol=ROUNDING)


def test_spectral_hammer_bounds_nothing_on_a_flat_spectrum():
    """The documented limit: two large values, one is hammered, the norm stays; a cap holds."""
    sigma = torch.tensor([3.0, 3.0, *[0.3] * 22], dtype=torch.float64)
    w = with_values((24, 40), sigma)
    assert float(rms_norm(project(w, "spectral_hammer", 1.2, power_iters=100))) > 2.9
    assert float(rms_norm(project(w, "exact_cap", 1.2))) <= 1.2


def test_spectral_weight_decay_shrinks_the_largest_value_alone():
    """Oracle: SVD in float64; the cap plays no part."""
    sigma = torch.tensor([3.0, *[0.3] * 23], dtype=torch.float64)
    w = with_values((24, 40), sigma)
    for w_max in (0.1, 10.0):
        got = project(w, "spectral_weight_decay", w_max, spectral_decay=0.25, power_iters=100)
        values = torch.linalg.svdvals(got) / (24 / 40) ** 0.5
        expected = torch.tensor([2.25, *[0.3] * 23], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("shape", [(1, 24, 40), (3, 40, 24)])
def test_top_singular_is_never_above_the_largest_value(shape):
    """Oracle: SVD in float64; power iteration under-estimates at any number of rounds."""
    w = torch.randn(shape)
    exact = torch.linalg.matrix_norm(w.double(), 2)
    for rounds in (1, 4, 200):
        sigma, u, v = top_singular(w, Step(largest=(None,) * len(w), power_iters=rounds))
        assert bool((sigma.flatten().double() <= exact * (1 + ROUNDING)).all())
        torch.testing.assert_close(u.mT @ w @ v, sigma, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sigma.flatten().double(), exact, rtol=1e-3, atol=0)


def test_warm_start_tightens_the_estimate():
    """Property: stored vectors are updated in place and bring the norm closer to the cap."""
    w = torch.randn(2, 64, 64)
    vectors = power_vectors(w)
    start = vectors.clone()
    cold = rms_norm(project(w, "spectral_normalize", 1.0, vectors=vectors, power_iters=2)).max()
    for _ in range(60):
        warm = rms_norm(project(w, "spectral_normalize", 1.0, vectors=vectors, power_iters=2)).max()
    assert not torch.equal(vectors, start)
    assert 1 - ROUNDING <= warm < cold


@pytest.mark.parametrize("kind", POWER)
def test_warm_start_leaves_a_direction_that_is_no_longer_the_largest(kind):
    """Property: a stored vector orthogonal to the top direction does not blind the next step."""
    w = torch.diag(torch.tensor([1.0, 3.0, 0.2, 0.1]))
    vectors = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1)
    got = project(w, kind, 1.0, vectors=vectors, spectral_decay=0.5, power_iters=16)
    assert float(got[1, 1]) <= 1.5 + ROUNDING
    assert float(vectors[0, 1, 0].abs()) > 0.99


def test_row_clip_bounds_every_row_and_keeps_short_ones():
    """Oracle: row RMS in closed form."""
    w = torch.randn(10, 8) * torch.logspace(-2, 2, 10)[:, None]
    rms = w.square().mean(1).sqrt()
    got = project(w, "row_clip", 1.0)
    torch.testing.assert_close(got.square().mean(1).sqrt(), rms.clamp_max(1.0), rtol=1e-5, atol=0)
    assert torch.equal(got[rms < 0.99], w[rms < 0.99])


def test_storage_margin_covers_the_rounding_of_stored_weights():
    """Property: flat spectra at the cap stay below it after rounding to 16 bits."""
    for dtype in STORAGE_MARGIN:
        w = with_values((64, 64), torch.full((64,), 1.3, dtype=torch.float64)).to(dtype)
        assert float(rms_norm(project(w, "exact_cap", 1.0))) <= 1


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        (("soft_cat", 1.0), {}, "soft_cap"),
        (("exact_cap", -1), {}, "w_max=-1"),
        (("none", 0), {}, "w_max=0"),
        (("exact_cap", [1.0, 1.0]), {}, "one per matrix"),
        (("spectral_weight_decay", 1.0), {"spectral_decay": 1.5}, "spectral_decay=1.5"),
    ],
)
def test_impossible_settings_are_config_errors(arguments, settings, match):
    """Errors name the value."""
    with pytest.raises(ConfigError, match=match):
        project(torch.ones(2, 2), *arguments, **settings)


def test_vectors_are_shape_errors():
    """Errors name the shape."""
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        project(torch.ones(3), "none", 1.0)
