"""Costs of a dense model and of its stages at other widths."""

import pytest
import torch

from compress.adapters import adapter_for
from compress.budgets.budget import Budget
from compress.budgets.clock import StageClock
from compress.pruner import prune_model
from compress.settings import CompressConfig

TOKENS = torch.randint(11, (24, 16), generator=torch.Generator().manual_seed(0))


def test_totals_are_those_of_the_model(make_model):
    """Oracle: counting; operations by hand for the matrices, attention apart."""
    model = make_model("relu", bias=False, layers=1)
    clock = StageClock(adapter_for(model), TOKENS)
    assert clock.total("params") == model.num_parameters
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.endswith("weight") and not name.startswith("embedding")
    )
    # Scores and mixing of every query with all 16 positions: 2 products of width 8.
    assert clock.total("flops") == 2 * matrices + 4 * 16 * 8
    assert clock.total("latency") > 0


@pytest.mark.parametrize("name", ["layers.1.mlp", "layers.1.heads"])
def test_a_stage_is_timed_at_the_asked_width(make_model, name, monkeypatch):
    """Oracle: a clock that reads how wide the narrow model's map is."""
    adapter = adapter_for(make_model("maxmin", heads=4))
    target = adapter.find(name)
    clock = StageClock(adapter, TOKENS)
    widths = []

    def timed(work):
        stage = work.__closure__[0].cell_contents
        module = stage.run.__self__
        module = module.attention.output if target.kind == "heads" else module.mlp.down
        widths.append(module.in_features)
        work()
        return 1.0

    monkeypatch.setattr(clock, "_timed", timed)
    for kept in (1, 2, target.components):
        clock.seconds(target, kept)
    assert widths == [target.unit, 2 * target.unit, target.inputs]


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
