"""Attention of whole windows without a cache, against the models' own forward passes."""

import dataclasses

import pytest
import torch

from serve import causal
from serve.causal import CausalAttention
from serve.decoder import as_decoder
from serve.evaluate import full_logits

EXACT = 1e-10  # float64 logits of size one to ten


@pytest.mark.parametrize("chunk", [512, 7])
def test_logits_equal_the_transformers_own(tiny, monkeypatch, chunk):
    """Oracle: the plain forward pass: biases, positional heads, groups; masks in pieces too."""
    monkeypatch.setattr(causal, "CHUNK", chunk)
    tokens = torch.tensor(tiny.make_prompts([30, 30]))
    with torch.no_grad():
        expected = tiny.model(tokens)
    assert float((full_logits(tiny.model, tokens) - expected).abs().max()) < EXACT


@pytest.mark.parametrize("window", [1, 5, 30])
def test_windows_hide_what_is_older(tiny, window):
    """Oracle: softmax over the last tokens, one query at a time."""
    spec = dataclasses.replace(as_decoder(tiny.model).layers[1], sliding_window=window)
    shape = (2, 12)
    q, k, v = (
        torch.randn(24, heads, spec.head_dim, dtype=torch.float64)
        for heads in (spec.heads, spec.kv_heads, spec.kv_heads)
    )
    found = CausalAttention([spec], windows=2)(0, q, k, v).unflatten(0, shape)
    q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
    for row in range(2):
        for t in range(12):
            first = max(0, t + 1 - window)
            for head in range(spec.heads):
                keys = k[row, first : t + 1, head // spec.group]
                weights = (spec.scale * keys @ q[row, t, head]).softmax(0)
                expected = weights @ v[row, first : t + 1, head // spec.group]
                assert float((found[row, t, head] - expected).abs().max()) < EXACT
