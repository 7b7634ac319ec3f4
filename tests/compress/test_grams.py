"""Streaming second moments."""

import pytest
import torch

from common.errors import DataError, ShapeError
from compress.grams import Moments

EXACT = 1e-12
"""Float64 sums in another order."""
SINGLE = 1e-5
"""Float32 products of one chunk, added in float64."""


def rows(count: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Return noise with a mean (count, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, inputs, generator=generator, dtype=torch.float64) + 0.5


def test_streaming_equals_batch_in_any_order_and_split():
    """Oracle: the product of the whole matrix with itself."""
    x_MI = rows(1000, 300)
    whole, first, second = Moments(300), Moments(300), Moments(300)
    for part in x_MI.split(170):
        whole.update(part[None])
    first.update(x_MI[600:])
    second.update(x_MI[:600])
    expected = x_MI.T @ x_MI / 1000
    for moments in (whole, first.merge(second), second.merge(first)):
        torch.testing.assert_close(moments.gram_II(), expected, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(moments.mean_I, x_MI.mean(0), rtol=EXACT, atol=EXACT)
        assert moments.count == 1000


def test_centred_gram_is_the_covariance():
    """Oracle: torch.cov without Bessel's correction."""
    x_MI = rows(500, 7)
    moments = Moments(7)
    moments.update(x_MI)
    expected = torch.cov(x_MI.T, correction=0)
    torch.testing.assert_close(moments.gram_II(centred=True), expected, rtol=EXACT, atol=EXACT)


def test_single_precision_chunks_stay_close_to_double():
    """Oracle: the float64 product."""
    x_MI = rows(20000, 64)
    moments = Moments(64)
    moments.update(x_MI.float())
    expected = x_MI.T @ x_MI / 20000
    error = (moments.gram_II() - expected).norm() / expected.norm()
    assert 0 < error < SINGLE


def test_non_finite_rows_are_skipped_but_not_many():
    """Oracle: the moments of the finite rows alone."""
    x_MI = rows(5000, 6)
    clean, dirty = Moments(6), Moments(6)
    clean.update(torch.cat([x_MI[:17], x_MI[18:]]))
    x_MI[17, 3] = torch.inf
    dirty.update(x_MI)
    assert dirty.skipped == 1
    torch.testing.assert_close(dirty.gram_II(), clean.gram_II(), rtol=EXACT, atol=EXACT)
    dirty.update(torch.full((6, 6), torch.nan, dtype=torch.float64))
    with pytest.raises(DataError, match="7 of 5006 rows were not finite"):
        dirty.gram_II()


def test_wrong_width_is_named():
    """The message holds both shapes."""
    with pytest.raises(ShapeError, match=r"\(2, 5\): expected \(\.\.\., 4\)"):
        Moments(4).update(torch.zeros(2, 5))
