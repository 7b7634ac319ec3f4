"""Stream margins: brute force and the closed-form worst direction are the oracles."""

import json
import math

import numpy as np
import pytest
import torch

from common.ledger import read_json
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from train.app import train
from train.margins import (
    CURVE_POINTS,
    MARGINS_FILE,
    image_margins,
    margin_curve,
    stream_margins,
    summary,
)

CONFIG = ModelConfig(vocab_size=11, width=8, layers=1, heads=2, context=12, final_scale=1.7)
ROUNDING = 1e-7  # given up by certified_radii for rounding


@pytest.fixture
def model():
    """Return a random model whose logits differ between positions."""
    model = LipschitzTransformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model.requires_grad_(False)


@pytest.fixture
def answered(model):
    """Return windows whose next tokens are the model's own answers."""
    ids_NT = torch.randint(0, 11, (6, 13))
    top_NT = model.double()(ids_NT[:, :-1]).argmax(dim=-1)
    # A prediction depends on the inputs only: judge each window at its last position.
    ids_NT[:, -1] = top_NT[:, -1]
    return ids_NT


def test_margin_is_the_least_ratio_over_all_pairs(model, answered):
    """Oracle: a loop over positions and pairs of head rows."""
    found = stream_margins(model, answered).reshape(6, 12)
    logits = model.double()(answered[:, :-1])
    head = CONFIG.final_scale * model.head.weight
    for window in range(6):
        for place in range(12):
            z, right = logits[window, place], answered[window, place + 1]
            top = int(z.argmax())
            ratios = [
                float((z[top] - z[j]) / (head[top] - head[j]).norm()) for j in range(11) if j != top
            ]
            expected = min(ratios) if top == right else -1.0
            assert float(found[window, place]) == pytest.approx(
                expected, rel=ROUNDING, abs=ROUNDING
            )
    assert (found[:, -1] >= 0).all()


def test_margin_is_where_the_answer_changes(model, answered):
    """Oracle: the stream moved along the worst pair's row difference, just below and above."""
    margin_N = stream_margins(model, answered).reshape(6, 12)[:, -1]
    x_NC = model.stream(model.embed(answered[:, :-1]))[:, -1]
    for x, margin in zip(x_NC, margin_N, strict=True):
        top = int(model.logits(x).argmax())
        rows = model.head.weight - model.head.weight[top]
        directions = rows[torch.arange(11) != top]
        directions = directions / directions.norm(dim=1, keepdim=True)
        inside = model.logits(x + (1 - 1e-6) * margin * directions).argmax(dim=-1)
        outside = model.logits(x + (1 + 1e-6) * margin * directions).argmax(dim=-1)
        assert (inside == top).all()
        assert (outside != top).any()


def test_equal_head_rows_never_change_places(model, answered):
    """Oracle: two tokens with one row and different biases keep their order at any distance."""
    with torch.no_grad():
        model.head.weight[:] = model.head.weight[0]
        model.head.bias = torch.nn.Parameter(torch.arange(11.0), requires_grad=False)
    answered[:, 1:] = 10
    assert (stream_margins(model, answered) >= 1e300).all()


def test_model_is_left_alone(answered):
    """Oracle: the type of the weights and the mode."""
    model = LipschitzTransformer(CONFIG).train()
    stream_margins(model, answered)
    assert model.training
    assert model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_curve_never_exceeds_what_was_observed(count):
    """Oracle: counting; the curve starts at the accuracy and falls."""
    margins = np.random.default_rng(0).normal(size=count)
    margins[0] = 0.5
    radii, shares = margin_curve(margins)
    assert radii == sorted(radii)
    assert len(radii) <= CURVE_POINTS
    assert shares[0] == pytest.approx((margins >= 0).mean())
    for radius, share in zip(radii, shares, strict=True):
        assert share <= (margins >= radius).mean()
    assert margin_curve(-np.ones(3)) == ([0.0], [0.0])


def test_image_margins_are_input_radii_times_the_feature_bound():
    """Oracle: one matrix, so that features are pixels: half the gap to the nearest class."""
    model = LipschitzMLP((2, 2)).requires_grad_(False)
    model.linears[0].weight.copy_(torch.eye(2))
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.zero_()
    images = torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 1.0]])
    found = image_margins(model, images, torch.tensor([0, 1, 1]))
    assert found["radii"] == pytest.approx([1 / math.sqrt(2), 3 / math.sqrt(2)], rel=ROUNDING)
    assert found["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert (found["inputs"], found["naive_bound"], found["unit_length"]) == (3, 1.0, 1.0)


def test_overflowing_bound_is_stored_as_none():
    """Oracle: JSON has no infinity."""
    found = summary(torch.tensor([0.5, -1.0]), math.inf, "embedding", 2.0)
    assert found["naive_bound"] is None
    assert found["accuracy"] == 0.5
    json.dumps(found, allow_nan=False)


def test_training_stores_margins_of_its_own_model(make_run):
    """Oracle: the file's accuracy against that of the summary; the bound that certify proves."""
    cfg, run = make_run("trainer.max_steps=20", "trainer.final_windows=null")
    metrics = train(cfg, run).metrics
    stored = read_json(run.directory / MARGINS_FILE)
    assert stored is not None
    assert stored["accuracy"] == pytest.approx(metrics["train/val_acc_full"], abs=0.01)
    assert stored["shares"][0] == pytest.approx(stored["accuracy"])
    assert stored["unit"] == "embedding"
    assert stored["unit_length"] > 0
    assert stored["naive_bound"] > 0
    assert metrics["cert/reference"] > 0
    assert metrics["cert/log10_naive"] == pytest.approx(np.log10(metrics["cert/naive"]))
    json.dumps(stored, allow_nan=False)
