"""Calibration inputs: sampled from a model, noise, text."""

import pytest
import torch

from common.errors import ConfigError
from compress.statistics import calibration
from compress.statistics.calibration import (
    TOKEN_SOURCES,
    calibration_tokens,
    gaussian_images,
    image_moments,
    sampled_tokens,
)

DEVIATIONS = 5.0
"""Standard deviations of chi-squared within which a right sampler stays, the seeds being fixed."""


class Text:
    """A corpus of 100 tokens in a row."""

    def windows(self, split, length, limit):
        """Return disjoint windows of the training split, as ``Corpus.windows`` does."""
        assert split == "train"
        ids = torch.arange(100)
        return torch.stack([ids[i * length : (i + 1) * length + 1] for i in range(limit)])


def misfit(found, expected):
    """Return the chi-squared statistic of counts, in standard deviations above its mean."""
    expected = expected.flatten() * found.sum()
    chi2 = float(((found.flatten() - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    return (chi2 - freedom) / (2 * freedom) ** 0.5


def counts(tokens_NT, vocab):
    """Return how often each sequence of tokens occurs (vocab, ..., vocab)."""
    place = sum(vocab**i * column for i, column in enumerate(tokens_NT.T.flip(0)))
    number = vocab ** tokens_NT.shape[1]
    return torch.bincount(place, minlength=number).double().reshape((vocab,) * tokens_NT.shape[1])


@torch.no_grad()
def test_sampled_sequences_follow_the_model(make_model):
    """Oracle: exact probabilities of all sequences of three tokens from whole forward passes."""
    model = make_model("maxmin", vocab_size=5, final_scale=0.5)
    every_V1 = torch.arange(5)[:, None]
    first_V = model(every_V1)[:, -1].softmax(-1).mean(0)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    after = model(pairs).softmax(-1)
    second_VV = after[::5, 0]
    third_VVV = after[:, 1].reshape(5, 5, 5)
    exact_VVV = first_V[:, None, None] * second_VV[:, :, None] * third_VVV
    found_VVV = counts(sampled_tokens(model, 20000, 3, seed=1), 5)
    assert abs(misfit(found_VVV, exact_VVV)) < DEVIATIONS
    uniform_VVV = torch.full_like(exact_VVV, 1 / 125)
    assert misfit(found_VVV, uniform_VVV) > 10 * DEVIATIONS


@pytest.mark.parametrize("source", ["model", "random"])
def test_same_seed_same_tokens(make_model, monkeypatch, source):
    """Property: seeded, within the vocabulary, global random state untouched, any batch size."""
    model = make_model()
    state = torch.get_rng_state()
    first_NT = calibration_tokens(source, model, 7, 16, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert first_NT.shape == (7, 16)
    assert first_NT.dtype == torch.int64
    assert 0 <= int(first_NT.min()) <= int(first_NT.max()) < 11
    monkeypatch.setattr(calibration, "CACHE_NUMBERS", 1)
    assert torch.equal(first_NT, calibration_tokens(source, model, 7, 16, seed=3))
    assert not torch.equal(first_NT, calibration_tokens(source, model, 7, 16, seed=4))


def test_sampling_leaves_the_mode_of_every_module(make_model):
    """Property: evaluation mode while sampling, each module's own mode afterwards."""
    model = make_model().train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    sampled_tokens(model, 2, 4)
    assert [module.training for module in model.modules()] == before


def test_random_tokens_are_uniform(make_model):
    """Oracle: chi-squared of equal probabilities."""
    tokens_NT = calibration_tokens("random", make_model(), 2000, 16, seed=0)
    found_V = counts(tokens_NT.reshape(-1, 1), 11)
    assert abs(misfit(found_V, torch.full((11,), 1 / 11))) < DEVIATIONS


def test_text_is_shuffled_windows(make_model):
    """Oracle: the corpus; every window once, whole, in an order that depends on the seed."""
    model = make_model()
    tokens_NT = calibration_tokens("data", model, 6, 16, seed=0, corpus=Text())
    assert torch.equal(tokens_NT, tokens_NT[:, :1] + torch.arange(16))
    assert sorted(tokens_NT[:, 0].tolist()) == [0, 16, 32, 48, 64, 80]
    other_NT = calibration_tokens("data", model, 6, 16, seed=1, corpus=Text())
    assert not torch.equal(tokens_NT, other_NT)


def test_mistakes_are_named(make_model):
    """Each message holds the value, what is expected and the remedy."""
    model = make_model()
    with pytest.raises(ConfigError, match="source='news': expected one of data, model, random"):
        calibration_tokens("news", model, 1, 8)
    with pytest.raises(ConfigError, match="source=data: expected a text; name a corpus, or"):
        calibration_tokens("data", model, 1, 8)
    for source in TOKEN_SOURCES:
        with pytest.raises(ConfigError, match=r"length=17: expected at most .* context of 16"):
            calibration_tokens(source, model, 1, 17, corpus=Text())


def test_gaussian_images_have_the_moments_of_the_data():
    """Oracle: the moments that were asked for, per channel, within sampling error."""
    data = torch.rand(50, 3, 8, 8) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 5
    mean, std = image_moments(data)
    assert mean.shape == std.shape == (3, 1, 1)
    torch.testing.assert_close(mean.flatten(), data.transpose(0, 1).flatten(1).mean(1))
    images = gaussian_images(400, (3, 8, 8), mean=mean, std=std, seed=2)
    assert torch.equal(images, gaussian_images(400, (3, 8, 8), mean=mean, std=std, seed=2))
    found_mean, found_std = image_moments(images)
    error = 5 / (400 * 64) ** 0.5
    assert float(((found_mean - mean) / std).abs().max()) < error
    assert float((found_std / std - 1).abs().max()) < error
    vectors = gaussian_images(4000, (6,), mean=1.0, std=2.0)
    assert image_moments(vectors)[0].shape == (6,)
    assert float((vectors.mean() - 1).abs()) < 5 * 2 / 24000**0.5
