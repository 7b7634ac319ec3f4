"""Certified norms against SVD, interval reasoning and hand-made extremes."""

import math
from fractions import Fraction

import pytest
import torch

from common import norms
from common.errors import CertificateError, ShapeError

SLACK = 5e-8  # a bound may lie this much above the SVD value (eigenvalue margin 1e-9 and shifts)

SHAPES = [(1, 1), (1, 7), (7, 1), (16, 16), (64, 16), (16, 64), (48, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_spectral_norm_bound_encloses_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Oracle: float64 SVD of the same entries."""
    w = torch.randn(shape).to(dtype)
    exact = float(torch.linalg.svdvals(w.double())[0])
    bound = norms.spectral_norm_bound(w)
    assert exact < bound <= exact * (1 + SLACK)
    assert norms.spectral_norm(w) == pytest.approx(exact, rel=1e-14)


def test_spectral_norm_bound_of_exact_cases() -> None:
    """Oracle: closed forms, rational arithmetic for the rank-one case."""
    assert norms.spectral_norm_bound(torch.zeros(3, 5)) == 0.0
    assert norms.spectral_norm_bound(torch.zeros(0, 5)) == 0.0
    assert norms.spectral_norm_bound(torch.eye(6)) >= 1.0
    u, v = torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0, 0.0])
    bound = Fraction(norms.spectral_norm_bound(torch.outer(u, v)))
    assert bound**2 >= Fraction(65) ** 2


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e300])
def test_spectral_norm_bound_survives_extreme_scales(scale: float) -> None:
    """Oracle: homogeneity; squares of these entries over- or underflow."""
    w = torch.randn(8, 12, dtype=torch.float64)
    exact = float(torch.linalg.svdvals(w)[0])
    bound = norms.spectral_norm_bound(w * scale) / scale
    assert exact * (1 - 1e-12) < bound <= exact * (1 + SLACK)


def test_spectral_norm_bound_of_clustered_and_singular_spectra() -> None:
    """Oracle: construction; equal singular values and rank deficiency are the hard cases."""
    q, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    clustered = q * torch.linspace(1 - 1e-13, 1, 32, dtype=torch.float64)
    assert 1 - 1e-12 < norms.spectral_norm_bound(clustered) < 1 + SLACK
    assert norms.spectral_norm_bound(q[:, :1] @ q[:1]) < 1 + SLACK


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    """Oracle: no bound exists."""
    w = torch.ones(3, 3)
    w[1, 2] = value
    with pytest.raises(CertificateError, match="NaN or infinity"):
        norms.spectral_norm_bound(w)


def test_wrong_tensors_are_refused() -> None:
    """Oracle: the contract."""
    with pytest.raises(ShapeError, match="matrix"):
        norms.spectral_norm_bound(torch.ones(3))
    with pytest.raises(ShapeError, match="floating"):
        norms.spectral_norm_bound(torch.ones(3, 3, dtype=torch.int64))


def test_lambda_max_bound_is_tight_and_counts_the_formation_error() -> None:
    """Oracle: eigvalsh; a perturbation within the stated error stays below the bound."""
    sym = torch.randn(24, 24, dtype=torch.float64)
    sym = (sym + sym.T) / 2
    top, vector = (part[..., -1] for part in torch.linalg.eigh(sym))
    assert float(top) < norms.lambda_max_bound(sym) < float(top) * (1 + SLACK)
    error = 1e-3
    worst = sym + error * torch.outer(vector, vector)
    assert norms.lambda_max_bound(sym, error) > float(torch.linalg.eigvalsh(worst)[-1])


def test_cholesky_test_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: with an eigenvalue routine that lies low, the bound is still above the truth."""
    sym = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    lie = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: 0.999999 * lie(m))
    assert norms.lambda_max_bound(sym) >= 5.0


def test_negative_definite_matrix() -> None:
    """Oracle: closed form."""
    bound = norms.lambda_max_bound(-torch.eye(4, dtype=torch.float64))
    assert -1 <= bound <= -1 + SLACK


@pytest.mark.parametrize("shapes", [((20, 4), (4, 20)), ((4, 20), (20, 8)), ((6, 6), (6, 6))])
def test_product_norm_bound_encloses_svd(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Oracle: SVD of the float64 product; rank-deficient left factor included."""
    left, right = torch.randn(shapes[0]), torch.randn(shapes[1])
    for factor in (left, left * (torch.arange(left.shape[1]) > 1)):
        exact = float(torch.linalg.svdvals(factor.double() @ right.double())[0])
        assert exact < norms.product_norm_bound(factor, right) <= exact * (1 + SLACK)
    assert norms.product_norm_bound(left * 0, right) == 0.0


def test_weighted_gram_error_covers_exact_rational_result() -> None:
    """Oracle: the same Gram matrix in rational arithmetic."""
    rows = torch.randn(5, 3, dtype=torch.float64)
    weights = torch.rand(5, dtype=torch.float64)
    gram, error = norms.weighted_gram(rows, weights)
    for i in range(3):
        for j in range(3):
            exact = sum(
                Fraction(float(w)) * Fraction(float(r[i])) * Fraction(float(r[j]))
                for w, r in zip(weights, rows, strict=True)
            )
            assert abs(exact - Fraction(float(gram[i, j]))) <= Fraction(error)


def test_rms_norm_factor() -> None:
    """Oracle: definition |W x|_rms / |x|_rms for the top singular vector."""
    w = torch.randn(9, 4, dtype=torch.float64)
    x = torch.linalg.svd(w).Vh[0]
    ratio = float((w @ x).square().mean().sqrt() / x.square().mean().sqrt())
    assert norms.rms_norm_factor(w) * norms.spectral_norm(w) == pytest.approx(ratio, rel=1e-12)


def test_powers_of_two_scale_exactly() -> None:
    """Oracle: ``math.ldexp``; the exponents pass float32's range and float64's."""
    values = [1.0, -0.3, 1e-300, 1e300, 5e-324]
    for exponent in (-2100, -1100, -500, -130, 0, 130, 500, 1100, 2090):
        found = norms.times_power(torch.tensor(values, dtype=torch.float64), exponent)
        for value, scaled in zip(values, found.tolist(), strict=True):
            if math.isinf(scaled):
                with pytest.raises(OverflowError):
                    math.ldexp(value, exponent)
            elif abs(scaled) >= 2.3e-308:
                assert scaled == math.ldexp(value, exponent)
            else:
                assert abs(scaled) <= 2.3e-308
                assert abs(math.ldexp(value, exponent)) <= 2.3e-308
