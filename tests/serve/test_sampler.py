"""Sampling against written-out definitions and known distributions."""

import math

import pytest
import torch

from serve.engine import sampler
from serve.engine.sampler import filtered_probabilities, sample, uniform
from serve.engine.sampling_params import SamplingParams

VOCAB = 40
EXACT = 1e-12
# Five standard deviations of a frequency estimated from DRAWS samples.
DRAWS = 20_000
FREQUENCY_TOLERANCE = 5 * 0.5 / math.sqrt(DRAWS)


def reference(
    logits: list[float], temperature: float, top_k: int, min_p: float, top_p: float
) -> list[float]:
    """Filter by the textbook: sort, keep k, drop the improbable, keep the shortest prefix."""
    top = max(logits)
    weights = [math.exp((z - top) / temperature) for z in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or None]
    order = [i for i in order if weights[i] >= min_p * max(weights)]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        mass += weights[i]
        if mass >= top_p * total and top_p < 1:
            break
    norm, chosen = sum(weights[i] for i in kept), set(kept)
    return [weights[i] / norm if i in chosen else 0.0 for i in range(len(logits))]


def draw(logits_RV: torch.Tensor, params: SamplingParams, seeds: list[int], position: int) -> list:
    """Return the tokens of a batch under one set of parameters."""
    rows = len(seeds)
    choices = sample(logits_RV, [params] * rows, seeds, [position] * rows)
    return [choice.token for choice in choices]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 1.0])
def test_filtered_probabilities_match_the_textbook(
    temperature: float, top_k: int, min_p: float, top_p: float
) -> None:
    """Oracle: the definition in plain Python."""
    logits_RV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).double() * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)
    p_RV = filtered_probabilities(logits_RV, [params] * 3)
    for p_V, logits_V in zip(p_RV, logits_RV.tolist(), strict=True):
        expected = reference(logits_V, temperature, top_k, min_p, top_p)
        expected_V = torch.tensor(expected, dtype=torch.float64)
        assert torch.equal(p_V > 0, expected_V > 0)
        torch.testing.assert_close(p_V, expected_V, atol=EXACT, rtol=0)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_filters_of_a_wide_vocabulary_sort_no_more_than_they_need(spread: float) -> None:
    """Oracle: the definition, where the mass of top-p lies within and beyond the sorted part."""
    logits_RV = torch.randn(6, 3000, generator=torch.Generator().manual_seed(7)).double() * spread
    kinds = [
        {"top_p": 0.9},
        {"top_k": 2000, "top_p": 0.99},
        {"min_p": 0.001},
        {"top_k": 7},
        {},
        {"top_p": 0.001},
    ]
    params = [SamplingParams(**kind) for kind in kinds]
    p_RV = filtered_probabilities(logits_RV, params)
    for row, (one, logits_V) in enumerate(zip(params, logits_RV.tolist(), strict=True)):
        expected = reference(logits_V, 1.0, one.top_k, one.min_p, one.top_p)
        expected_V = torch.tensor(expected, dtype=torch.float64)
        assert torch.equal(p_RV[row] > 0, expected_V > 0)
        torch.testing.assert_close(p_RV[row], expected_V, atol=EXACT, rtol=0)
        alone_1V = filtered_probabilities(logits_RV[row : row + 1], [one])
        assert torch.equal(alone_1V[0], p_RV[row])


def test_filtered_probabilities_break_ties_toward_the_smaller_id() -> None:
    """Oracle: four equal tokens, two kept."""
    p_RV = filtered_probabilities(torch.zeros(1, 4), [SamplingParams(top_k=2)])
    assert p_RV.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_sample_follows_the_distribution() -> None:
    """Oracle: the softmax itself, by the law of large numbers over seeds and over positions."""
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    expected = torch.softmax(logits_V.double(), 0)
    params = SamplingParams()
    by_seed = draw(logits_V.expand(DRAWS, -1), params, list(range(DRAWS)), 3)
    choices = sample(logits_V.expand(DRAWS, -1), [params] * DRAWS, [9] * DRAWS, range(DRAWS))
    by_position = [choice.token for choice in choices]
    for tokens in (by_seed, by_position):
        frequency = torch.bincount(torch.tensor(tokens), minlength=5) / DRAWS
        assert (frequency - expected).abs().max() < FREQUENCY_TOLERANCE


def test_uniform_is_spread_and_depends_on_both_arguments() -> None:
    """Oracle: decile counts of independent uniforms; correlation of neighbouring streams."""
    grid = torch.tensor([[uniform(s, p) for p in range(200)] for s in range(-50, 50)])
    deciles = torch.histc(grid, 10, 0, 1) / grid.numel()
    assert (deciles - 0.1).abs().max() < FREQUENCY_TOLERANCE
    centred = grid - 0.5
    assert ((centred[1:] * centred[:-1]).mean() * 12).abs() < 0.04
    assert ((centred[:, 1:] * centred[:, :-1]).mean() * 12).abs() < 0.04
    assert grid.unique().numel() > 0.999 * grid.numel()
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_sample_is_the_same_alone_and_in_a_batch_of_sixteen() -> None:
    """Oracle: each row by itself; rows of every kind are mixed (O7)."""
    logits_RV = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(2))
    params = [
        SamplingParams(temperature=(0.0, 0.7, 1.3)[r % 3], top_k=(0, 3)[r % 2], logprobs=r % 4)
        for r in range(16)
    ]
    seeds, positions = list(range(100, 116)), list(range(16))
    together = sample(logits_RV, params, seeds, positions)
    alone = [
        sample(logits_RV[r : r + 1], params[r : r + 1], seeds[r : r + 1], positions[r : r + 1])[0]
        for r in range(16)
    ]
    assert together == alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sample_refuses_only_the_row_that_is_not_finite(bad: float) -> None:
    """Oracle: the documented None; the neighbours are untouched."""
    logits_RV = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    for broken in (
        SamplingParams(temperature=0.0),
        SamplingParams(logprobs=3),
        SamplingParams(top_k=3, min_p=0.1, top_p=0.8, logit_bias={1: 2.0}),
    ):
        params = [SamplingParams(), broken, SamplingParams(top_p=0.9)]
        clean = sample(logits_RV, params, [1, 2, 3], [0, 0, 0])
        broken_RV = logits_RV.clone()
        broken_RV[1, 7] = bad
        choices = sample(broken_RV, params, [1, 2, 3], [0, 0, 0])
        assert choices == [clean[0], None, clean[2]]
        everywhere = sample(torch.full_like(logits_RV, bad), params, [1, 2, 3], [0, 0, 0])
        assert everywhere == [None, None, None]


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_sample_greedy_takes_the_largest(temperature: float) -> None:
    """Oracle: argmax; a vanishing temperature is greedy."""
    logits_RV = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(4))
    tokens = draw(logits_RV, SamplingParams(temperature=temperature), [0] * 5, 0)
    assert tokens == logits_RV.argmax(1).tolist()


def test_sample_small_temperature_and_huge_logits_stay_finite() -> None:
    """Oracle: the limit is the largest logit."""
    logits_RV = torch.tensor([[3e30, -3e30, 2.9e30]])
    assert draw(logits_RV, SamplingParams(temperature=1e-4), [5], 0) == [0]


def test_sample_logprobs_are_those_of_the_raw_logits() -> None:
    """Oracle: log-softmax of the unfiltered logits; the chosen token comes first."""
    logits_RV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(temperature=1.5, top_k=30, logprobs=4, seed=1)
    choice = sample(logits_RV, [params], [1], [0])[0]
    expected = torch.log_softmax(logits_RV[0].double(), 0)
    assert next(iter(choice.logprobs)) == choice.token
    assert set(expected.topk(4).indices.tolist()) <= set(choice.logprobs)
    for token, value in choice.logprobs.items():
        assert value == pytest.approx(float(expected[token]), abs=EXACT)


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (1 - 2**-53, 3)])
def test_sample_never_draws_a_token_without_probability(
    monkeypatch: pytest.MonkeyPatch, u: float, token: int
) -> None:
    """Oracle: the first and the last token that top-k keeps, at the ends of the unit interval."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: u)
    logits_RV = torch.tensor([[-50.0, 0.3, 0.1, 0.2, -60.0]])
    assert draw(logits_RV, SamplingParams(top_k=3), [0], 0) == [token]
