"""The data-free certificate of positional heads, against softmax weights and running sequences."""

# Legend: H heads, T query positions.

import dataclasses

import pytest
import torch

from serve.decoder import LipschitzDecoder
from serve.kv import FullPolicy, WindowPolicy
from serve.kv.bias import BiasTable
from serve.kv.positional_certificate import (
    PositionalCertificate,
    evicted_mass_bound,
    positional_certificate,
)
from serve.kv.summary import Summary, segment_exponent

EXACT = 1e-9


def spec_with(tiny, bias_HT):
    """The positional layer of the tiny model with another bias."""
    return dataclasses.replace(LipschitzDecoder(tiny.model).layers[2], bias_HT=bias_HT)


@pytest.mark.parametrize("kind", ["random", "steep", "rising", "none"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("window", [1, 7, 60])
def test_bound_is_the_mass_that_a_window_leaves_out(tiny, kind, sinks, window):
    """Oracle: softmax over all distances, position by position; equal but for rounding."""
    context = 50
    torch.manual_seed(1)
    distance = torch.arange(context, dtype=torch.float64)
    rows = {
        "random": 3 * torch.randn(4, context, dtype=torch.float64),
        "steep": -distance * torch.tensor([[0.1], [1.0], [5.0], [0.0]]),
        "rising": distance * torch.tensor([[0.1], [1.0], [3.0], [0.0]]),
        "none": None,
    }
    spec = spec_with(tiny, rows[kind])
    got_HT = evicted_mass_bound(spec, context, window=window, sinks=sinks)
    for t in range(context):
        bias = torch.zeros(4, context) if rows[kind] is None else rows[kind]
        weights = bias[:, : t + 1].double().softmax(1)
        gone = (torch.arange(t + 1) >= window) & (t - torch.arange(t + 1) >= sinks)
        true_H = (weights * gone).sum(1)
        assert bool((got_HT[:, t] >= true_H * (1 - 1e-14)).all())
        assert float((got_HT[:, t] - true_H).max()) < EXACT


def test_the_ledger_sees_the_same_mass_while_it_runs(tiny):
    """Oracle: the window's own mass; the run-time bound of a positional head is exact as well."""
    decoder = LipschitzDecoder(tiny.model)
    spec, context, clusters = decoder.layers[2], decoder.context, 8
    exponent = segment_exponent(context, clusters)
    table = BiasTable(spec.bias_HT[None], 2**exponent)
    policy = WindowPolicy(budget=20, interval=6, sinks=3, window=5)
    bound = positional_certificate(decoder, policy)
    for seen in (26, 40, 77):
        summary = Summary.empty((1, spec.kv_heads, clusters), 2, torch.device("cpu"), exponent)
        summary.seen[:] = seen
        gone_cluster = torch.arange(3, seen - 17) // 2**exponent
        summary.count += gone_cluster.bincount(minlength=clusters)
        place = [*range(3), *range(seen - 17, seen)]
        kept = torch.tensor(place).expand(1, spec.kv_heads, len(place))
        at = torch.tensor([[seen]])
        found = table.masses(torch.zeros(1).long(), at, summary.clusters(torch.float64, kept))
        bias = spec.bias_HT[:, : seen + 1].double()
        true_H = found.log_total.logsumexp(-1).flatten() - bias.logsumexp(1)
        want = evicted_mass_bound(spec, context, window=18, sinks=3)[:, seen]
        assert float((true_H.exp() - want).abs().max()) < EXACT
        assert bool((true_H.exp() <= torch.tensor(bound.mass_bounds[2]) + EXACT).all())
    assert bound.window == 18
    assert "6 purely positional heads" in str(bound)


@pytest.mark.parametrize("lost", [1e-9, 0.00005, 0.12345, 0.99999, 1.0])
def test_the_text_claims_no_more_than_the_bound(lost):
    """Property: the share that is said to be kept is at most one minus the bound."""
    text = str(PositionalCertificate(window=8, sinks=1, mass_bounds={0: [lost, 0.0]}))
    said = float(text.partition("at least ")[2].partition(" of")[0])
    assert 1 - lost - 1e-4 <= said <= 1 - lost


def test_nothing_is_claimed_where_nothing_is_evicted(tiny):
    """Oracle: the definition."""
    decoder = LipschitzDecoder(tiny.model)
    assert positional_certificate(decoder, FullPolicy(budget=None)) is None
    whole = WindowPolicy(budget=decoder.context, interval=6)
    assert positional_certificate(decoder, whole).largest == 0.0
