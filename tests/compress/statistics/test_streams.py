"""Activations moved through a model stage by stage."""

import pytest
import torch

from compress.adapters import adapter_for
from compress.statistics import collect as statistics
from compress.statistics.collect import collect, run
from compress.statistics.streams import Streams

EXACT = 1e-12
"""Float64 sums in another order."""


def tokens() -> torch.Tensor:
    """Return random token sequences (6, 8)."""
    return torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_a_dense_walk_sees_what_one_pass_sees(make_model, monkeypatch, holdout):
    """Oracle: ``collect``, and the whole forward pass at the end; batches of two sequences."""
    monkeypatch.setattr(statistics, "BATCH_NUMBERS", 16)
    adapter = adapter_for(make_model("maxmin"))
    expected = collect(adapter, tokens(), adapter.targets(), holdout=holdout)
    streams = Streams(adapter, tokens(), holdout)
    for stage in adapter.stages():
        for name in stage.targets:
            fitted, held = streams.moments(stage, adapter.find(name))
            for moments, other in ((fitted, expected.fitted[name]), (held, expected.held[name])):
                assert moments.count == other.count
                torch.testing.assert_close(
                    moments.gram_II(), other.gram_II(), rtol=EXACT, atol=EXACT
                )
        streams.advance(stage)
    with torch.no_grad():
        expected_BTC = run(adapter, tokens())
    found_BTC = torch.cat([*streams.fitted, *streams.held])
    torch.testing.assert_close(found_BTC, expected_BTC, rtol=EXACT, atol=EXACT)


def test_later_places_see_what_was_written_before_them(make_model):
    """Oracle: a dense pass over a model with the same weights removed by hand."""
    adapter = adapter_for(make_model("gelu"))
    first, last = adapter.find("layers.0.mlp"), adapter.find("layers.1.mlp")
    weight_IO = adapter.weight(first)
    weight_IO[:16] = 0
    changed = adapter.working_copy()
    changed.write(first, weight_IO)
    expected = collect(changed, tokens(), [last], holdout=0.0).fitted[last.name]
    dense = collect(adapter, tokens(), [last], holdout=0.0).fitted[last.name]
    streams = Streams(adapter, tokens(), 0.0)
    for stage in adapter.stages():
        if last.name in stage.targets:
            found = streams.moments(stage, last)[0]
        if first.name in stage.targets:
            adapter.write(first, weight_IO)
        streams.advance(stage)
    torch.testing.assert_close(found.gram_II(), expected.gram_II(), rtol=EXACT, atol=EXACT)
    assert float((found.gram_II() - dense.gram_II()).norm()) > 1e-3
