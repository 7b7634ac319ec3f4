"""Calibration sequences sampled from models of ``transformers``."""

import pytest
import torch

from compress.statistics.calibration import calibration_tokens, sampled_tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampled_tokens_follow_the_model(make_decoder, logits, family):
    """Oracle: whole forward passes; each token is the inverse distribution function of its noise.

    The sampler's uniform numbers are drawn again here; one token later than the first, sequences
    begin with the beginning-of-sequence token.
    """
    model = make_decoder(family)
    tokens_NT = sampled_tokens(model, 5, 12, seed=4)
    assert torch.equal(tokens_NT[:, 0], torch.zeros(5, dtype=torch.int64))
    generator = torch.Generator().manual_seed(4)
    noise_NT = torch.rand(5, 13, generator=generator, dtype=torch.float64)
    below_NTV = logits(model, tokens_NT).double().softmax(-1).cumsum(-1)
    expected_NT = (below_NTV[:, :-1] <= noise_NT[:, 2:, None]).sum(-1)
    assert torch.equal(tokens_NT[:, 1:], expected_NT)
    assert torch.equal(tokens_NT, calibration_tokens("model", model, 5, 12, seed=4))


def test_models_without_a_first_token_of_their_own_begin_with_one(make_decoder, logits):
    """Oracle: the model's answer to the discarded token, from the same uniform numbers."""
    model = make_decoder("llama", bos_token_id=None)
    tokens_NT = sampled_tokens(model, 8, 3, seed=4)
    noise_NT = torch.rand(8, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    before_N1 = (noise_NT[:, :1] * 40).long()
    below_NV = logits(model, before_N1)[:, -1].double().softmax(-1).cumsum(-1)
    assert torch.equal(tokens_NT[:, 0], (below_NV <= noise_NT[:, 1:2]).sum(-1))
