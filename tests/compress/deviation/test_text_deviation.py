"""Per-position deviations on text: order of measurement and bounds, causality, refutation."""

import copy
import dataclasses

import pytest
import torch

from common.errors import CertificateError
from compress.adapters import LipschitzAdapter
from compress.deviation import text as text_deviation
from compress.deviation.network import certified_deviation
from compress.deviation.text import expected_est, measure_deviation, text_bounds
from solvers.bounds import certify

LAYOUT = {"heads": 4, "kv_heads": 2, "content_heads": 2}


@pytest.fixture
def case(pruned_pair, tokens):
    """Return a pruned pair, its certified deviation and measurements on other text."""
    dense, certificate, pruning = pruned_pair("gelu", keep_heads=0.5, **LAYOUT)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate, max_evals=0)
    measured = measure_deviation(dense, pruning.model, tokens(8, seed=7))
    return dense, pruning, deviation, measured


@pytest.mark.parametrize("activation", ["gelu", "relu", "maxmin"])
@pytest.mark.parametrize("comp", ["none", "lsq"])
def test_every_position_moves_less_than_both_of_its_bounds(pruned_pair, tokens, activation, comp):
    """Pointwise: actual <= A and actual <= B; neither above the bound over all inputs."""
    dense, certificate, pruning = pruned_pair(activation, comp, keep_heads=0.5, **LAYOUT)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate, max_evals=0)
    bounds = text_bounds(measure_deviation(dense, pruning.model, tokens(8, seed=7)), deviation)
    actual_M = bounds.measured.logits_M
    for form, bound_M in zip(deviation.forms, (bounds.a_M, bounds.b_M), strict=True):
        assert bool((actual_M <= bound_M + bounds.allowance).all())
        assert float(bound_M.max()) <= form.bound
    assert float(actual_M.min()) > 0


def test_bounds_of_a_position_read_no_later_token(case, tokens):
    """Oracle: the same text cut short gives the same numbers for the positions that remain."""
    dense, pruning, deviation, measured = case
    short = measure_deviation(dense, pruning.model, tokens(8, seed=7)[:, :5])
    whole_M, part_M = (text_bounds(m, deviation).bound_M for m in (measured, short))
    torch.testing.assert_close(part_M.view(8, 5), whole_M.view(8, 16)[:, :5], rtol=1e-9, atol=0)


def test_changes_are_those_of_single_blocks(case, tokens):
    """Oracle: the first block at the embedding, where both trajectories agree."""
    dense, pruning, _, measured = case
    x_BTC = dense.embed(tokens(8, seed=7))
    old, new = dense.layers[0], pruning.model.layers[0]
    change_BT = (old.attend_block(x_BTC) - new.attend_block(x_BTC)).detach().norm(dim=-1)
    expected_M = change_BT.cummax(1).values.flatten()
    for running_ML in (measured.running_a_ML, measured.running_b_ML):
        torch.testing.assert_close(running_ML[:, 0], expected_M)
    torch.testing.assert_close(measured.mean_squares_L[0], change_BT.square().mean())
    assert measured.deltas[0] == pytest.approx(float(change_BT.max()))


def test_batches_do_not_matter(case, tokens, monkeypatch):
    """Oracle: all sequences at once against one at a time."""
    dense, pruning, _, measured = case
    monkeypatch.setattr(text_deviation, "BATCH_TOKENS", 1)
    again = measure_deviation(dense, pruning.model, tokens(8, seed=7))
    for field in dataclasses.fields(measured):
        one, other = (getattr(m, field.name) for m in (measured, again))
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def test_proved_positions_keep_their_token(make_model, tokens):
    """A small change of a confident model: proofs exist, and each of them is true."""
    dense = make_model("relu", bias=False)
    with torch.no_grad():
        dense.head.weight.mul_(30)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        changed.layers[1].mlp.down.weight.mul_(1.001)
        changed.layers[0].attention.output.weight.mul_(0.999)
    certificate = certify(dense, tighten=False)
    deviation = certified_deviation(dense, changed, None, certificate)
    bounds = text_bounds(measure_deviation(dense, changed, tokens()), deviation)
    assert 0 < bounds.proved_domain <= bounds.proved_text <= bounds.measured.top1_agreement
    # Oracle: proofs by the pair norm are weaker than comparing a margin with the pair that moved.
    moved = deviation.b.stream(bounds.measured.running_b_ML) * certificate.pair_norm
    proved_M = bounds.measured.margins_M > moved * (1 + 1e-6)
    assert bool(bounds.measured.same_M[proved_M].all())
    assert float(proved_M.double().mean()) <= bounds.proved_text


def test_a_wrong_constant_is_found_out(case):
    """Constants a thousand times too small are refuted by the text."""
    _, _, deviation, measured = case
    blocks = tuple(
        dataclasses.replace(block, tightened=block.tightened / 1000)
        for block in deviation.b.certificate.blocks
    )
    wrong = dataclasses.replace(
        deviation.b,
        certificate=dataclasses.replace(
            deviation.b.certificate, blocks=blocks, head_norm=deviation.b.certificate.head_norm / 50
        ),
    )
    with pytest.raises(CertificateError, match="refuted"):
        text_bounds(measured, dataclasses.replace(deviation, b=wrong))


def test_quantiles_and_estimate_follow_their_formulas(case):
    """Oracle: torch.quantile to the nearest rank; the sum of gains times root mean squares."""
    _, _, deviation, measured = case
    bounds = text_bounds(measured, deviation)
    for name, row_M in (("actual", measured.logits_M), ("bound", bounds.bound_M)):
        found = bounds.quantiles()[name]
        for label, share in (("median", 0.5), ("q90", 0.9), ("max", 1.0)):
            expected = torch.quantile(row_M, share, interpolation="nearest")
            assert found[label] == pytest.approx(float(expected))
    gains = torch.tensor(deviation.b.gains(), dtype=torch.float64)
    expected = float((gains * measured.mean_squares_L.sqrt()).sum())
    assert expected_est(measured, deviation.b) == pytest.approx(expected)
    assert expected < float(bounds.b_M.max())


def test_removed_neurons_without_effect_do_not_refute_their_proof(make_model, tokens):
    """Rounding of narrower products is above a bound of 0, but within the stated allowance."""
    dense = make_model("gelu", bias=False)
    kept = {}
    with torch.no_grad():
        for index, layer in enumerate(dense.layers):
            layer.mlp.down.weight[:, ::3] = 0
            kept[f"layers.{index}.mlp"] = torch.tensor([i for i in range(32) if i % 3])
    pruned = LipschitzAdapter(dense).cut(kept)
    deviation = certified_deviation(dense, pruned, kept, certify(dense, tighten=False))
    assert deviation.logits == 0.0
    bounds = text_bounds(measure_deviation(dense, pruned, tokens()), deviation)
    assert bounds.measured.logits <= bounds.allowance < 1e-9
    assert bounds.proved_text == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_rounding_carried_by_loose_constants_exceeds_no_proved_bound(make_model, tokens, seed):
    """Heads and neurons without effect go from a network of large weights: all is proved."""
    dense = make_model("gelu", bias=False, layers=4, heads=4, width=16, seed=seed)
    kept = {}
    with torch.no_grad():
        for index, layer in enumerate(dense.layers):
            layer.mlp.up.weight.mul_(4)
            layer.mlp.down.weight.mul_(4)
            layer.attention.query.weight.mul_(4)
            layer.mlp.down.weight[:, ::3] = 0
            kept[f"layers.{index}.mlp"] = torch.tensor([i for i in range(64) if i % 3])
    pruned = LipschitzAdapter(dense).cut(kept)
    deviation = certified_deviation(dense, pruned, kept, certify(dense, tighten=False))
    measured = measure_deviation(dense, pruned, tokens())
    # Oracle: the recursion itself turns measured rounding into more than the allowance.
    bounds = text_bounds(measured, deviation)
    carried = float(deviation.b.logits(measured.running_b_ML).max())
    assert carried > bounds.allowance > 0
    assert float(bounds.bound_M.max()) == deviation.logits == 0.0
    assert bounds.proved_text == bounds.proved_domain == 1.0
