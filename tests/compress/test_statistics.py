"""One pass over the dense model, and what can be done with what it collected."""

import logging

import pytest
import torch

from compress.adapters import adapter_for
from compress.statistics import collect

EXACT = 1e-12
"""Float64 sums in another order."""


def tokens(count: int = 5, length: int = 8) -> torch.Tensor:
    """Return random token sequences (count, length)."""
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("holdout", [0.0, 0.4])
def test_collect_sees_what_enters_each_pruned_map(make_model, holdout):
    """Oracle: forward hooks on the maps during an ordinary forward pass."""
    model = make_model("maxmin")
    adapter = adapter_for(model)
    seen: dict[str, torch.Tensor] = {}
    for target in adapter.targets():
        adapter.module(target).register_forward_pre_hook(
            lambda module, args, name=target.name: seen.__setitem__(name, args[0].detach())
        )
    model(tokens())
    expected_BTI = dict(seen)
    statistics = collect(adapter, tokens(), adapter.targets(), holdout=holdout)
    assert set(statistics.fitted) == set(statistics.held) == set(expected_BTI)
    for name, x_BTI in expected_BTI.items():
        parts = (x_BTI[:3], x_BTI[3:]) if holdout else (x_BTI, x_BTI)
        for moments, part in zip((statistics.fitted, statistics.held), parts, strict=True):
            x_MI = part.reshape(-1, part.shape[-1])
            gram_II = moments[name].gram_II()
            torch.testing.assert_close(gram_II, x_MI.T @ x_MI / len(x_MI), rtol=EXACT, atol=EXACT)


def test_too_few_tokens_warn(make_model, caplog):
    """Fewer than two rows per input: the warning says how many would do."""
    adapter = adapter_for(make_model())
    with caplog.at_level(logging.WARNING):
        collect(adapter, tokens(2), adapter.targets(), holdout=0.0)
    assert "16 calibration rows for 32 inputs" in caplog.text


def test_one_sequence_is_used_for_both_parts(make_model):
    """With nothing to hold out the held-out statistics are the fitted ones."""
    adapter = adapter_for(make_model())
    statistics = collect(adapter, tokens(1), adapter.targets(), holdout=0.1)
    assert statistics.held == statistics.fitted
