"""Bits per byte, divergence and deviation on text, from one pass per model."""

import math

import pytest
import torch

from compress import measure
from compress.measure import Reference, bits_per_byte


@pytest.fixture
def windows_BT():
    """Return random windows with their final target, more than one batch of them."""
    return torch.randint(11, (7, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pair(make_model):
    """Return two different models of one vocabulary."""
    return make_model("gelu", seed=0), make_model("maxmin", seed=1)


def test_quality_by_hand(pair, windows_BT):
    """Oracle: sums over every position and token, written out, in float64."""
    dense, model = pair
    found = Reference(dense, windows_BT, 2.0).quality(model)
    p_BTV, q_BTV = (one(windows_BT[:, :-1]).detach().softmax(-1) for one in pair)
    nats = divergence = 0.0
    for b in range(7):
        for t in range(16):
            nats -= math.log(q_BTV[b, t, windows_BT[b, t + 1]].item())
            for p, q in zip(p_BTV[b, t].tolist(), q_BTV[b, t].tolist(), strict=True):
                divergence += p * math.log(p / q)
    moved_BTV = (dense(windows_BT[:, :-1]) - model(windows_BT[:, :-1])).detach()
    assert found.bits_per_byte == pytest.approx(nats / (7 * 16 * 2 * math.log(2)), rel=1e-5)
    assert found.kl_nats == pytest.approx(divergence / (7 * 16), rel=1e-4)
    assert found.deviation == pytest.approx(
        max(moved_BTV.pow(2).mean(-1).sqrt().flatten().tolist())
    )
    same = p_BTV.argmax(-1) == q_BTV.argmax(-1)
    assert found.top1_agreement == pytest.approx(float(same.double().mean()))
    assert found.bits_per_byte == pytest.approx(bits_per_byte(model, windows_BT, 2.0), rel=1e-6)


def test_a_model_does_not_differ_from_itself(pair, windows_BT):
    """Oracle: exactly zero, not up to rounding."""
    found = Reference(pair[0], windows_BT, 1.0).quality(pair[0])
    assert (found.kl_nats, found.deviation, found.top1_agreement) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("tokens", [1, 32, 10000])
@pytest.mark.parametrize("kept", [0, 1 << 25])
def test_batches_and_memory_change_nothing(pair, windows_BT, monkeypatch, tokens, kept):
    """Oracle: the figures of one batch with kept logits."""
    expected = Reference(pair[0], windows_BT, 1.0).quality(pair[1])
    monkeypatch.setattr(measure, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(measure, "KEPT_NUMBERS", kept)
    found = Reference(pair[0], windows_BT, 1.0).quality(pair[1])
    for name in ("bits_per_byte", "kl_nats", "deviation", "top1_agreement"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
