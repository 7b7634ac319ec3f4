"""Bias, penalties and bans against their written-out definitions."""

import torch

from serve.engine.logits import TokenCounts, adjust
from serve.engine.sampler import sample
from serve.engine.sampling_params import SamplingParams

VOCAB = 12
EXACT = 1e-12
PROMPT, TEXT = [1, 2, 2, 3], [3, 4, 4, 4]


def make_counts(steps: int) -> TokenCounts:
    """Return the counts of the prompt and text above, taken in several calls."""
    counts = TokenCounts(VOCAB, torch.device("cpu"))
    for length in range(0, len(PROMPT + TEXT) + 1, steps):
        counts.follow((PROMPT + TEXT)[:length], len(PROMPT))
    counts.follow(PROMPT + TEXT, len(PROMPT))
    return counts


def reference(logits: list[float], params: SamplingParams, banned: tuple[int, ...]) -> list[float]:
    """Apply the definitions token by token, in the documented order."""
    out = []
    for token, value in enumerate(logits):
        value += params.logit_bias.get(token, 0.0)
        if token in PROMPT + TEXT:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * TEXT.count(token)
        value -= params.presence_penalty * (token in TEXT)
        out.append(torch.finfo(torch.float64).min if token in banned else value)
    return out


def test_adjust_matches_the_definitions_row_by_row() -> None:
    """Oracle: plain Python; each setting alone, all together, none; counts in any portions."""
    logits_RV = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(0)).double() * 3
    bias = {2: 5.0, 3: -100.0, 11: 0.5}
    params = [
        SamplingParams(),
        SamplingParams(logit_bias=bias),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.5),
        SamplingParams(frequency_penalty=-1.5),
        SamplingParams(presence_penalty=2.0),
        SamplingParams(
            logit_bias=bias, repetition_penalty=2, frequency_penalty=0.3, presence_penalty=-1
        ),
    ]
    banned = [(), (), (), (), (), (4, 5), (0,)]
    before_RV = logits_RV.clone()
    for steps in (1, 3, 8):
        counts = [make_counts(steps) if p.has_penalty else None for p in params]
        got_RV = adjust(logits_RV, params, counts, banned)
        assert torch.equal(logits_RV, before_RV)
        for got_V, logits_V, one, ban in zip(got_RV, logits_RV, params, banned, strict=True):
            expected = torch.tensor(reference(logits_V.tolist(), one, ban), dtype=torch.float64)
            torch.testing.assert_close(got_V, expected, atol=EXACT, rtol=EXACT)


def test_adjust_leaves_plain_rows_to_themselves() -> None:
    """Oracle: the very tensor, in its own dtype, where nobody asks for anything."""
    logits_RV = torch.randn(2, VOCAB).bfloat16()
    assert adjust(logits_RV, [SamplingParams()] * 2, [None] * 2, [()] * 2) is logits_RV


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    """Oracle: log-softmax before bias; the token is the one that the bias forces."""
    logits_RV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).double()
    params = SamplingParams(logit_bias={5: 100.0}, logprobs=1, temperature=0.0)
    (choice,) = sample(logits_RV, [params], [0], [0])
    expected = torch.log_softmax(logits_RV[0], 0)
    assert choice.token == 5
    assert abs(choice.logprobs[5] - float(expected[5])) < EXACT


def test_a_row_of_banned_tokens_alone_still_has_a_choice() -> None:
    """Oracle: some token, and no error."""
    for params in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(top_p=0.5)):
        (choice,) = sample(torch.zeros(1, 4), [params], [0], [0], banned=[range(4)])
        assert choice.token in range(4)
    everything = SamplingParams(logit_bias=dict.fromkeys(range(4), -100.0))
    (choice,) = sample(torch.zeros(1, 4), [everything], [0], [0])
    assert choice.token in range(4)


def test_bans_hold_for_drawn_and_greedy_rows() -> None:
    """Oracle: the largest logit is banned; no draw ever finds it."""
    logits_RV = torch.tensor([[9.0, 1.0, 0.0]]).expand(200, -1)
    for temperature in (0.0, 1.0, 2.0):
        params = [SamplingParams(temperature=temperature)] * 200
        choices = sample(logits_RV, params, range(200), [0] * 200, banned=[(0,)] * 200)
        assert all(choice.token != 0 for choice in choices)
