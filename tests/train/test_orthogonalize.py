"""Polar factors: float64 scalar evaluation and the SVD are the oracles."""

import pytest
import torch

from common.errors import ConfigError, ShapeError
from train.orthogonalize import TABLES, orthogonalize, overshoot

# float32 rounding of six steps on matrices up to 96 x 96.
ROUNDING = 1e-5
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


def test_orthogonalize_zero_gives_zero():
    """Oracle: closed form."""
    assert torch.equal(orthogonalize(torch.zeros(2, 5, 3)), torch.zeros(2, 5, 3))


def test_orthogonalize_rejects_vectors_and_unknown_tables():
    """Errors name the shape and the known tables."""
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        orthogonalize(torch.ones(4))
    with pytest.raises(ConfigError, match="six_step"):
        orthogonalize(torch.ones(4, 4), "seven_step")
