"""Costs of a dense model and of its stages at other widths."""

import pytest
import torch
from torch import nn

from common.models import LipschitzMLP
from compress.adapters import Adapter, adapter_for
from compress.budgets import clock as clock_module
from compress.budgets.budget import Budget
from compress.budgets.clock import StageClock
from compress.pruner import prune_model
from compress.settings import CompressConfig

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(11, (24, 16), generator=GENERATOR)
IMAGES = torch.rand(64, 1, 8, 8, generator=GENERATOR)


def test_totals_are_those_of_the_model(make_model):
    """Oracle: counting; operations by hand, as ``Target`` counts them."""
    model = make_model("relu", bias=False, layers=1)
    clock = StageClock(adapter_for(model), TOKENS)
    assert clock.total("params") == model.num_parameters
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.endswith("weight") and not name.startswith("embedding")
    )
    # Scores and mixing of a query with half of 16 positions on average: 2 products of width 8.
    assert clock.total("flops") == 2 * matrices + 4 * 16 / 2 * 8
    assert clock.total("latency") > 0


@pytest.fixture
def cnn():
    """Return a convolutional chain in training mode, with running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(6 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        )


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1.heads"])
def test_a_stage_is_timed_at_the_asked_width(make_model, name, monkeypatch):
    """Oracle: the width of the model that is timed."""
    adapter = adapter_for(make_model("maxmin", heads=4))
    _require_widths(adapter, TOKENS, name, [1, 2, adapter.find(name).components], monkeypatch)


@pytest.mark.parametrize("name", ["3", "6", "9"])
def test_producer_and_consumer_of_a_chain_are_timed(cnn, name, monkeypatch):
    """Oracle: the width of the model that is timed; the producer is in the stage before."""
    _require_widths(adapter_for(cnn, IMAGES), IMAGES, name, [1, 2, 3], monkeypatch)


def test_a_classifier_is_timed(monkeypatch):
    """Oracle: as above; images need not be flat."""
    adapter = adapter_for(LipschitzMLP((64, 6, 6, 3), activation="maxmin"))
    _require_widths(adapter, IMAGES, "linears.2", [1, 2, 3], monkeypatch)


def _require_widths(adapter: Adapter, inputs, name: str, widths: list[int], monkeypatch) -> None:
    target, found = adapter.find(name), []

    def noted(model, batch) -> Adapter:
        narrow = adapter_for(model, batch)
        found.append(narrow.find(name).components)
        return narrow

    monkeypatch.setattr(clock_module, "adapter_for", noted)
    clock = StageClock(adapter, inputs)
    assert all(clock.seconds(target, kept) > 0 for kept in widths)
    assert found == widths


@pytest.mark.parametrize("kind", ["params", "flops", "latency"])
def test_totals_leave_a_training_model_as_it_was(cnn, kind):
    """Oracle: its state before; operations by hand, one image through BatchNorm in training."""
    before = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    total = StageClock(adapter_for(cnn, IMAGES), IMAGES).total(kind)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cnn.state_dict().items())
    assert all(module.training for module in cnn.modules())
    if kind == "flops":
        assert total == 2 * (36 * 4 * 9 + 16 * 6 * 36 + 8 * 96 + 3 * 8)


@pytest.mark.parametrize("kind", ["params", "flops", "latency"])
@pytest.mark.parametrize("whole", ["prunable", "model"])
def test_every_budget_prunes(make_model, kind, whole, monkeypatch):
    """A fake clock that is linear in the width makes latency as exact as the others."""
    model = make_model("relu", bias=False, heads=4)
    monkeypatch.setattr(StageClock, "seconds", lambda self, target, kept: float(kept))
    monkeypatch.setattr(
        StageClock,
        "total",
        lambda self, asked, real=StageClock.total: (
            200.0 if asked == "latency" else real(self, asked)
        ),
    )
    settings = CompressConfig(
        keep=0.8, keep_heads=None, budget=Budget(kind=kind, of=whole), min_keep=0.0, ridge=1e-4
    )
    pruned = prune_model(model, TOKENS, settings).model
    assert pruned.num_parameters < model.num_parameters
    if (kind, whole) == ("params", "model"):
        assert pruned.num_parameters <= 0.8 * model.num_parameters
