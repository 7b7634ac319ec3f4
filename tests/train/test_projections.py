"""Weight constraints: the SVD, closed forms and the published coupling table are the oracles."""

import logging

import pytest
import torch

from common.errors import ConfigError, ShapeError
from train import projections
from train.projections import PROJECTIONS, power_vectors, project, soft_cap_strength

SPECTRAL = ("soft_cap", "exact_cap", "spectral_normalize")
SHAPES = [(24, 40), (40, 24), (32, 32), (3, 16, 48)]
# float32 rounding on top of a cap.
ROUNDING = 1e-5
# alpha at w_max = 1 for update norms, specification section 2.2 (six digits).
PUBLISHED_ALPHA = {0.01: 0.058025, 0.05: 0.122439, 0.1: 0.158864, 0.2: 0.188631, 0.3: 0.195277}


def rms_norm(w):
    """RMS->RMS norm sqrt(I/O) sigma_1 by SVD in float64."""
    return (w.shape[-1] / w.shape[-2]) ** 0.5 * torch.linalg.matrix_norm(w.double(), 2)


def near_cap(shape, w_max, excess, seed=0):
    """Random matrices whose largest RMS->RMS norms are spread up to ``w_max + excess``."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    sigma = torch.linspace(1.0, 0.1, sigma.shape[-1]) * (w_max + excess)
    return (shape[-2] / shape[-1]) ** 0.5 * (u * sigma) @ vt


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
    got = project(w, "soft_cap", 1.2, update_norm=0.1)
    torch.testing.assert_close(got, expected, rtol=0, atol=10 * projections.MARGIN)


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


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constraint_contract(kind, shape, dtype):
    """Property of every member: cap held, shape and dtype kept, input untouched, small kept."""
    w = near_cap(shape, 0.9, 0.1).to(dtype)
    before = w.clone()
    got = project(w, kind, 0.9, update_norm=0.12, power_iters=200)
    slack = 0.02 if dtype == torch.bfloat16 else ROUNDING
    assert got.shape == w.shape
    assert got.dtype == dtype
    assert torch.equal(w, before)
    assert float(rms_norm(got).max()) <= 0.9 * (1 + slack)
    tiny = 1e-3 * w
    torch.testing.assert_close(
        project(tiny, kind, 0.9, update_norm=0.12), tiny, rtol=0.01, atol=1e-7
    )


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_zero_stays_zero(kind):
    """Oracle: closed form; no division by a zero norm."""
    zero = torch.zeros(6, 4)
    assert torch.equal(project(zero, kind, 1.0, update_norm=0.1), zero)


@pytest.mark.parametrize("kind", ["exact_cap", "spectral_normalize", "row_clip"])
def test_idempotent(kind):
    """Property: a second application changes nothing beyond rounding."""
    once = project(torch.randn(24, 40), kind, 0.8, power_iters=400)
    torch.testing.assert_close(
        project(once, kind, 0.8, power_iters=400), once, rtol=ROUNDING, atol=ROUNDING
    )


def test_soft_cap_falls_back_to_the_exact_cap_with_one_warning(caplog, monkeypatch):
    """Oracle: the exact cap; one log line however often it happens."""
    monkeypatch.setattr(projections, "_warned", set())
    w = near_cap((24, 40), 1.0, 0.9)
    with caplog.at_level(logging.WARNING):
        first = project(w, "soft_cap", 1.0, update_norm=0.9)
        project(w, "soft_cap", 1.0, update_norm=0.9)
    torch.testing.assert_close(first, project(w, "exact_cap", 1.0))
    assert len(caplog.records) == 1
    assert "exact cap" in caplog.text


def test_soft_cap_without_update_norm_is_an_error():
    """The coupling cannot be guessed."""
    with pytest.raises(ConfigError, match="update_norm"):
        project(torch.ones(2, 2), "soft_cap", 1.0)


def test_spectral_normalize_divides_by_the_norm_it_finds():
    """Oracle: SVD; a gap in the spectrum lets power iteration converge."""
    w = near_cap((24, 24), 4.0, 0.0)
    torch.testing.assert_close(project(w, "spectral_normalize", 2.0, power_iters=300), w / 2)


def test_spectral_normalize_warm_start_tightens_the_estimate():
    """Property: stored vectors are updated in place and bring the norm closer to the cap."""
    w = torch.randn(2, 64, 64)
    vectors = power_vectors(w)
    start = vectors.clone()
    cold = rms_norm(project(w, "spectral_normalize", 1.0, vectors=vectors, power_iters=2)).max()
    for _ in range(60):
        warm = rms_norm(project(w, "spectral_normalize", 1.0, vectors=vectors, power_iters=2)).max()
    assert not torch.equal(vectors, start)
    assert 1 - ROUNDING <= warm < cold


def test_row_clip_bounds_every_row_and_keeps_short_ones():
    """Oracle: row RMS in closed form."""
    w = torch.randn(10, 8) * torch.logspace(-2, 2, 10)[:, None]
    rms = w.square().mean(1).sqrt()
    got = project(w, "row_clip", 1.0)
    torch.testing.assert_close(got.square().mean(1).sqrt(), rms.clamp_max(1.0), rtol=1e-5, atol=0)
    assert torch.equal(got[rms < 0.99], w[rms < 0.99])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [(("soft_cat", 1.0), "soft_cap"), (("exact_cap", -1), "w_max=-1"), (("none", 0), "w_max=0")],
)
def test_impossible_settings_are_config_errors(arguments, match):
    """Errors name the value."""
    with pytest.raises(ConfigError, match=match):
        project(torch.ones(2, 2), *arguments)


def test_vectors_are_shape_errors():
    """Errors name the shape."""
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        project(torch.ones(3), "none", 1.0)
