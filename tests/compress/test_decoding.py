"""Token by token with a cache against the whole sequence at once."""

import pytest
import torch

from common.errors import ShapeError
from compress.decoding import KVCache

EXACT = 1e-12
"""Float64 in another order of summation."""
SHAPES = {
    "plain": {"position_bias": False},
    "bias": {},
    "groups": {"heads": 4, "kv_heads": 2, "content_heads": 2},
    "positional": {"content_heads": 0},
    "uneven": {"heads": (4, 2), "kv_heads": (1, 2), "head_dim": (2, 4)},
    "skipped": {"attn_residual": (0.0, 0.5)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_the_whole_sequence(make_model, shape):
    """Oracle: the forward pass of all tokens, at every position up to the full context."""
    model = make_model("maxmin", **SHAPES[shape])
    tokens_BT = torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(0))
    expected_BTV = model(tokens_BT)
    cache = KVCache(model)
    torch.testing.assert_close(
        cache.prefill(tokens_BT[:, :5]), expected_BTV[:, 4], rtol=EXACT, atol=EXACT
    )
    for end in range(5, 15):
        logits_BV = cache.step(tokens_BT[:, end : end + 1])
        torch.testing.assert_close(logits_BV, expected_BTV[:, end], rtol=EXACT, atol=EXACT)
    assert cache.length == 15
    fresh = KVCache(model)
    for start in (0, 4, 8, 12):
        logits_BV = fresh.prefill(tokens_BT[:, start : start + 4])
        torch.testing.assert_close(logits_BV, expected_BTV[:, start + 3], rtol=EXACT, atol=EXACT)


def test_the_context_is_the_limit(make_model):
    """Oracle: the model's own limit; the message names both lengths."""
    cache = KVCache(make_model())
    cache.prefill(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ShapeError, match="17 tokens: expected at most the model's context of 16"):
        cache.step(torch.zeros(1, 1, dtype=torch.long))
