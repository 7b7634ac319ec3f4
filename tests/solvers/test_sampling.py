"""Sampling laws: unbiased draws, determinism, refusals."""

import pytest
import torch

from common.errors import ConfigError
from solvers.sampling import Sampler, check_law, importance_law, uniform_law

EXACT = 1e-12
DRAWS = 20_000
CHI2_999 = 20.5  # 99.9 % quantile of the chi-square distribution with 5 degrees of freedom
LIKE = torch.zeros(1, dtype=torch.float64)


def law_of(kind):
    """Return a law over six components."""
    return uniform_law(6) if kind == "uniform" else importance_law(torch.arange(1.0, 7.0))


@pytest.mark.parametrize("kind", ["uniform", "importance"])
@pytest.mark.parametrize("batch", [1, 4])
def test_weights_make_the_mean_unbiased(kind, batch):
    """Oracle: sum over all components of q_i times the weight of i, times M N, is N."""
    law = law_of(kind)
    sampler = Sampler((law,), batch, seed=0, like=LIKE)
    weight_of = {}
    for _ in range(200):
        draw = sampler.draw()
        assert draw.index_M.shape == draw.weight_M.shape == (batch,)
        weight_of |= dict(zip(draw.index_M.tolist(), draw.weight_M.tolist(), strict=True))
    assert sorted(weight_of) == list(range(6))
    for index, weight in weight_of.items():
        assert batch * 6 * float(law[index]) * weight == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("kind", ["uniform", "importance"])
def test_components_appear_as_often_as_the_law_says(kind):
    """Oracle: chi-square test of the counts."""
    law = law_of(kind)
    sampler = Sampler((law,), 8, seed=1, like=LIKE)
    index = torch.cat([sampler.draw().index_M for _ in range(DRAWS // 8)])
    counts, expected = index.bincount(minlength=6).double(), law * len(index)
    assert float(((counts - expected) ** 2 / expected).sum()) < CHI2_999


def test_a_component_of_probability_zero_is_never_drawn():
    """Oracle: the law itself, with zeros first, in the middle and last."""
    law = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    sampler = Sampler((law,), 64, seed=0, like=LIKE)
    seen = torch.cat([sampler.draw().index_M for _ in range(500)]).unique()
    assert seen.tolist() == [1, 3]


def test_without_replacement_a_draw_repeats_nothing():
    """Oracle: set sizes, and equal frequencies of all components over many draws."""
    sampler = Sampler((uniform_law(10),), 4, seed=0, like=LIKE, replacement=False)
    index = torch.stack([sampler.draw().index_M for _ in range(5000)])
    assert all(len(set(row)) == 4 for row in index.tolist())
    share = index.flatten().bincount(minlength=10) / 5000
    assert torch.allclose(share, torch.full((10,), 0.4), atol=0.04)  # 5 standard deviations


def test_blocks_are_drawn_independently():
    """Oracle: shapes, and the joint frequency is the product of the laws."""
    laws = (torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.25, 0.25]).double())
    sampler = Sampler(laws, 2, seed=3, like=LIKE)
    draws = [sampler.draw() for _ in range(10_000)]
    index = torch.cat([draw.index_M for draw in draws])
    assert draws[0].index_M.shape == draws[0].weight_M.shape == (2, 2)
    joint = (index[:, 0] * 3 + index[:, 1]).bincount(minlength=6) / len(index)
    assert torch.allclose(joint.double(), torch.outer(*laws).flatten(), atol=0.015)
    first = draws[0]
    for block, law in enumerate(laws):
        expected = 1 / (2 * len(law) * law[first.index_M[:, block]])
        assert torch.allclose(first.weight_M[:, block], expected, atol=EXACT)


def test_a_stream_depends_on_its_seed_alone():
    """Oracle: the same stream again, whatever else draws random numbers in between."""
    streams = []
    for noise in (0, 7):
        torch.manual_seed(noise)
        sampler = Sampler((law_of("importance"),), 3, seed=5, like=LIKE)
        torch.rand(noise)
        stream = [(sampler.draw().index_M.tolist(), sampler.coin(0.3)) for _ in range(3000)]
        streams.append(stream)
    assert streams[0] == streams[1]
    other = Sampler((law_of("importance"),), 3, seed=6, like=LIKE)
    assert [other.draw().index_M.tolist() for _ in range(9)] != [s[0] for s in streams[0][:9]]


def test_coins_fall_with_their_probability():
    """Oracle: binomial mean within five standard deviations; 1 always falls."""
    sampler = Sampler((uniform_law(2),), 1, seed=0, like=LIKE)
    assert all(sampler.coin(1.0) for _ in range(10_000))
    heads = sum(sampler.coin(0.1) for _ in range(10_000))
    assert abs(heads - 1000) < 5 * 30


def test_draws_follow_the_dtype_of_the_problem():
    """Oracle: the dtype of the tensor given."""
    sampler = Sampler((uniform_law(3),), 2, seed=0, like=torch.zeros(1, dtype=torch.float32))
    assert sampler.draw().weight_M.dtype == torch.float32
    assert sampler.draw().index_M.dtype == torch.int64


def test_constants_that_are_all_zero_give_the_uniform_law():
    """Oracle: equal probabilities."""
    assert torch.equal(importance_law(torch.zeros(4)), uniform_law(4))


def test_refuses_what_is_no_law():
    """Negative, NaN, unnormalised and two-dimensional laws; impossible batches."""
    for law in ([-0.5, 1.5], [float("nan"), 1.0], [0.5, 0.6], [[0.5], [0.5]]):
        with pytest.raises(ConfigError, match="law"):
            check_law("law", torch.tensor(law))
    with pytest.raises(ConfigError, match="batch=0"):
        Sampler((uniform_law(3),), 0, seed=0, like=LIKE)
    with pytest.raises(ConfigError, match="batch=4"):
        Sampler((uniform_law(3),), 4, seed=0, like=LIKE, replacement=False)
    with pytest.raises(ConfigError, match="one block"):
        Sampler((uniform_law(3),) * 2, 2, seed=0, like=LIKE, replacement=False)
