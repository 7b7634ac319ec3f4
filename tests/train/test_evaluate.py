"""Validation figures: closed forms and written-out sums are the oracles."""

import math

import pytest
import torch

from train.evaluate import (
    REFERENCE_WINDOWS,
    bits_per_byte,
    evaluate,
    inputs_and_targets,
    loss_and_hits,
    mean_loss,
    reference_windows,
)

VOCABULARY = 5


class Shift(torch.nn.Module):
    """Predicts input + 1 with certainty ``margin`` in nats."""

    def __init__(self, margin):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.tensor(float(margin)))

    def forward(self, tokens_BT):
        """Return logits."""
        target_BT = (tokens_BT + 1) % VOCABULARY
        return self.margin * torch.nn.functional.one_hot(target_BT, VOCABULARY)


def test_loss_and_hits_of_a_known_distribution():
    """Oracle: closed form of the softmax with one logit ``margin`` above the others."""
    batch = torch.tensor([[0, 1, 2, 0]])
    loss, hits = loss_and_hits(Shift(2.0)(batch[:, :-1]), batch[:, 1:])
    norm = math.log(math.exp(2) + VOCABULARY - 1)
    assert loss.item() == pytest.approx(((norm - 2) * 2 + norm) / 3)
    assert hits.item() == pytest.approx(2 / 3)


def test_mean_loss_of_labels():
    """Oracle: the softmax written out; one label per row, logits in half precision."""
    logits_NV = torch.tensor([[2.0, 0.0], [1.0, 3.0]]).bfloat16()
    expected = math.log(1 + math.exp(-2))
    assert mean_loss(logits_NV, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_evaluate_weighs_the_last_short_batch_correctly():
    """Oracle: one batch of everything."""
    data = inputs_and_targets(torch.randint(0, VOCABULARY, (7, 6)))
    model = Shift(1.5)
    whole = evaluate(model, *data, 7)
    assert evaluate(model, *data, 3) == pytest.approx(whole)


def test_reference_windows_overlap_and_stop():
    """Oracle: the published protocol: windows start at 0, 1, 2, ... and 1,280 of them count."""
    ids = torch.arange(2000)
    windows = reference_windows(ids, 16)
    assert windows.shape == (REFERENCE_WINDOWS, 17)
    assert torch.equal(windows[:, 0], torch.arange(1280))
    assert reference_windows(torch.arange(20), 16).shape == (4, 17)


def test_bits_per_byte():
    """Oracle: a uniform choice of 256 bytes costs 8 bits; tokens of 2 bytes halve it."""
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 2.0) == pytest.approx(4)
