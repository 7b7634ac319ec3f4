"""Polar factors: float64 scalar evaluation and the SVD are the oracles."""

import pytest
import torch

from common.errors import ConfigError, ShapeError
from train.orthogonalize import TABLES, odd_step, orthogonalize, overshoot

# float32 rounding of six steps on matrices up to 96 x 96.
ROUNDING = 1e-5
# The stated bfloat16 overshoot may exceed the largest one found here by so much.
BF16_TIGHTNESS = 0.01
# Relative error of one bfloat16 product of well-scaled matrices.
BF16_PRODUCT = 2e-2
# Largest and smallest outputs of the published tables on [0.01, 1] (three digits).
PUBLISHED_RANGE = {
    "six_step": (0.995, 0.9994),
    "five_step": (0.977, 1.033),
    "classic": (0.681, 1.135),
    "polar_express": (0.858, 1.1412),
}


@pytest.mark.parametrize("name", TABLES)
def test_overshoot_is_the_smallest_constant_above_the_maximum(name):
    """Oracle: float64 evaluation on a fine logarithmic grid of (0, 1]."""
    table = TABLES[name]
    x = torch.logspace(-7, 0, 400_001, dtype=torch.float64).clamp_max(1.0) / table.inflation
    largest = float(table(x).max())
    assert largest <= table.overshoot <= largest + 2e-5


@pytest.mark.parametrize("name", TABLES)
def test_table_range_matches_the_published_one(name):
    """Oracle: the ranges of the specification's table."""
    x = torch.linspace(0.01, 1.0, 100_001, dtype=torch.float64)
    low, high = PUBLISHED_RANGE[name]
    y = TABLES[name](x)
    assert low <= float(y.min())
    assert float(y.max()) <= high


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_orthogonalize_maps_singular_values_by_the_polynomial(name, shape):
    """Oracle: SVD in float64 with the scalar polynomial on the normalised singular values."""
    g = torch.randn(shape, dtype=torch.float64)
    u, sigma, vt = torch.linalg.svd(g, full_matrices=False)
    table = TABLES[name]
    expected = (u * table(sigma / (table.inflation * sigma.norm()))) @ vt
    torch.testing.assert_close(orthogonalize(g, name, torch.float64), expected)


def test_orthogonalize_stack_equals_one_by_one():
    """Oracle: the same function on each matrix."""
    stack = torch.randn(3, 20, 12)
    single = torch.stack([orthogonalize(g) for g in stack])
    torch.testing.assert_close(orthogonalize(stack), single)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_orthogonalize_ignores_the_scale(scale):
    """Property: tiny and huge gradients give the same direction (no epsilon is felt)."""
    g = torch.randn(16, 24)
    torch.testing.assert_close(orthogonalize(g * scale), orthogonalize(g), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_norm_stays_below_the_overshoot(name, dtype):
    """Property: spectral norm bound on ill-conditioned inputs, float32 and bfloat16."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        u, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator))
        v, _ = torch.linalg.qr(torch.randn(48, 48, generator=generator))
        sigma = torch.logspace(0, -1 - seed, 48)
        largest = torch.linalg.matrix_norm(orthogonalize((u * sigma) @ v, name, dtype), 2)
        assert largest <= overshoot(name, dtype) + ROUNDING


def spectra(size):
    """Singular values of every kind: flat, Gaussian, geometric, deficient, one above the rest."""
    yield torch.ones(size)
    yield torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(size)).norm(dim=1)
    yield from (torch.logspace(0, -decades, size) for decades in (1, 2, 3, 4, 6))
    yield torch.arange(1.0, size + 1) ** -1
    yield torch.cat([torch.ones(size // 2), torch.zeros(size - size // 2)])
    yield from (torch.cat([torch.ones(1), torch.full((size - 1,), x)]) for x in (0.02, 4.07e-3))


@pytest.mark.parametrize("name", TABLES)
def test_bfloat16_overshoot_is_measured_and_not_far_above(name):
    """Oracle: SVD in float64 over spectra and shapes; no less may be stated, nor far more."""
    largest = 0.0
    for rows, columns in ((32, 32), (48, 96), (96, 48), (128, 128)):
        size = min(rows, columns)
        generator = torch.Generator().manual_seed(rows)
        stack = []
        for sigma in spectra(size):
            u, _ = torch.linalg.qr(torch.randn(rows, size, generator=generator))
            v, _ = torch.linalg.qr(torch.randn(columns, size, generator=generator))
            stack.append((u * sigma) @ v.T)
        polar = orthogonalize(torch.stack(stack), name, torch.bfloat16).double()
        largest = max(largest, float(torch.linalg.matrix_norm(polar, 2).max()))
    assert largest <= overshoot(name, torch.bfloat16) <= largest * (1 + BF16_TIGHTNESS)


@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12)])
def test_odd_step_evaluates_its_polynomial(shape):
    """Oracle: SVD in float64; products in bfloat16 leave the sum in the weight's own dtype."""
    x = torch.randn(shape, dtype=torch.float64) / 4
    u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
    expected = (u * (1.5 * sigma - 0.7 * sigma**3 + 0.2 * sigma**5)[..., None, :]) @ vt
    got = odd_step(x, 1.5, -0.7, torch.float64, 0.2)
    torch.testing.assert_close(got, expected)
    coarse = odd_step(x.float(), 1.5, -0.7, torch.bfloat16, 0.2)
    assert coarse.dtype == torch.float32
    error = torch.linalg.matrix_norm(coarse.double() - expected)
    assert bool((error <= BF16_PRODUCT * torch.linalg.matrix_norm(expected)).all())


def test_odd_step_takes_one_cubic_coefficient_per_matrix():
    """Oracle: one matrix at a time."""
    x, b = torch.randn(3, 6, 4), torch.tensor([0.1, -0.2, 0.0])
    together = odd_step(x, 1.0, b[:, None, None], torch.float32)
    alone = [odd_step(m[None], 1.0, float(c), torch.float32)[0] for m, c in zip(x, b, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_orthogonalize_zero_gives_zero():
    """Oracle: closed form."""
    assert torch.equal(orthogonalize(torch.zeros(2, 5, 3)), torch.zeros(2, 5, 3))


def test_orthogonalize_rejects_vectors_and_unknown_tables():
    """Errors name the shape and the known tables."""
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        orthogonalize(torch.ones(4))
    with pytest.raises(ConfigError, match="six_step"):
        orthogonalize(torch.ones(4, 4), "seven_step")
