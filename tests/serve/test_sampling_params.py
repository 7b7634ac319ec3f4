"""Sampling parameters against their documented ranges."""

import pytest

from common.errors import ConfigError
from serve.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": 2.5},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": ("",)},
        {"stop": ("x" * 257,)},
        {"stop": tuple("abcdefghijklmnopq")},
        {"stop_token_ids": (-1,)},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"n": 0},
        {"n": 17},
        {"n": True},
        {"top_k": -2},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"logit_bias": {"abc": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: "x"}},
        {"logit_bias": [1]},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"min_tokens": -1},
        {"min_tokens": 65},
        {"certified": 1},
    ],
)
def test_sampling_params_reject(settings: dict) -> None:
    """Oracle: the documented ranges."""
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**settings)
    assert "\n" not in str(caught.value)


def test_sampling_params_accept_the_ends_of_their_ranges() -> None:
    """Oracle: the documented ranges; -1 and 0 both switch top-k off."""
    params = SamplingParams(
        n=16,
        temperature=2,
        top_k=-1,
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=0.01,
        logit_bias={0: -100, 7: 100.0},
        stop="one",
        seed=-(2**63),
        max_tokens=3,
        min_tokens=3,
        logprobs=20,
        prompt_logprobs=0,
    )
    assert (params.top_k, params.temperature, params.stop) == (0, 2.0, ("one",))
    assert params.has_penalty
    assert params.has_filter
    assert hash(params) == hash(params)
    default = SamplingParams()
    assert not default.has_penalty
    assert not default.has_filter


def test_sampling_params_do_not_share_the_callers_bias() -> None:
    """Oracle: frozen means frozen."""
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    assert SamplingParams(logit_bias=None).logit_bias == {}
