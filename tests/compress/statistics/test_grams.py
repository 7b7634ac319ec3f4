"""Streaming second moments."""

import pytest
import torch

from common.errors import DataError, ShapeError
from compress.statistics.grams import Moments, _add_panels, sums_device

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


def test_panels_cover_the_upper_triangle():
    """Oracle: the whole product; more than two panels, the last one narrow."""
    x_MI = rows(50, 300)
    panels_II = torch.zeros(300, 300, dtype=torch.float64)
    _add_panels(panels_II, x_MI)
    expected = (x_MI.T @ x_MI).triu()
    torch.testing.assert_close(panels_II.triu(), expected, rtol=EXACT, atol=EXACT)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_lose_nothing_more(dtype):
    """Oracle: the float64 product of the rounded rows; float16 sums would overflow."""
    x_MI = (100 * rows(2000, 5)).to(dtype)
    moments = Moments(5)
    moments.update(x_MI)
    expected = x_MI.double().T @ x_MI.double() / 2000
    torch.testing.assert_close(moments.gram_II(), expected, rtol=SINGLE, atol=0.0)


def test_autocast_and_fast_products_around_it_change_nothing():
    """Oracle: the sums without either; the caller's settings stay."""
    x_MI = rows(300, 20).float()
    plain, inside = Moments(20), Moments(20)
    plain.update(x_MI)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.update(x_MI)
            assert (x_MI @ x_MI.T).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain.second_II, inside.second_II)


def test_sums_stay_where_float64_exists():
    """MPS has none: its sums are kept on the CPU; others keep theirs with the rows."""
    assert sums_device("mps") == torch.device("cpu")
    assert sums_device("cuda:1") == torch.device("cuda:1")
    assert Moments(3, "mps").second_II.device.type == "cpu"
