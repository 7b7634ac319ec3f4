"""Whole-model pruning: budget, order, cap, determinism."""

import dataclasses

import pytest
import torch

from common.errors import ConfigError
from common.models import LipschitzMLP
from common.models.config import ACTIVATIONS
from compress.adapters import adapter_for
from compress.budgets.allocate import ALLOCATORS
from compress.deviation.text import measure_deviation
from compress.pruner import prune_model, survey
from compress.settings import ORDERS, CompressConfig
from solvers.bounds import certify

SINGLE = 1e-6
"""Relative; float32 weights, checked in float64."""


def tokens(count: int = 48, seed: int = 0) -> torch.Tensor:
    """Return random token sequences (count, 16)."""
    return torch.randint(11, (count, 16), generator=torch.Generator().manual_seed(seed))


def prune(model, inputs, settings, **options):
    """Prune under the naive certificate's amplifications."""
    gains = adapter_for(model).amplifications(certify(model, tighten=False))
    return prune_model(model, inputs, settings, gains=gains, **options)


def norm(weight: torch.Tensor) -> float:
    """Return the largest singular value."""
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


@pytest.mark.parametrize(
    ("activation", "order", "allocation"),
    [
        *((activation, "sequential", "uniform") for activation in ACTIVATIONS),
        *(("maxmin", order, name) for order in ORDERS for name in ALLOCATORS),
    ],
)
def test_budget_is_met_and_pairs_stay_together(make_model, activation, order, allocation):
    """Every activation, and for pairs every combination of order and allocation."""
    model = make_model(activation)
    settings = CompressConfig(keep=0.5, order=order, allocation=allocation, ridge=1e-4)
    pruning = prune(model, tokens(), settings)
    assert 0.5 <= pruning.removed_fraction < 0.6
    for fit in pruning.fits:
        assert torch.equal(fit.kept_K, fit.kept_K.sort().values)
        if fit.target.unit == 2:
            assert torch.equal(fit.kept_K[::2] + 1, fit.kept_K[1::2])
            assert bool((fit.kept_K[::2] % 2 == 0).all())
        assert 0 <= fit.error < 1
        assert fit.error <= fit.held_error * 1.5


@pytest.mark.parametrize("tau", [1.0, 1.25])
@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_product_of_norms_never_exceeds_its_cap(make_model, activation, tau):
    """Oracle: singular values of the stored single-precision weights; the cap binds."""
    model = make_model(activation).float()
    settings = CompressConfig(keep=0.4, tau=tau, ridge=1e-4)
    pruning = prune(model, tokens(), settings)
    for old, new in zip(model.layers, pruning.model.layers, strict=True):
        before = norm(old.mlp.up.weight) * norm(old.mlp.down.weight)
        after = norm(new.mlp.up.weight) * norm(new.mlp.down.weight)
        assert after <= tau * before
        assert after >= 0.5 * before


def test_naive_certificate_does_not_grow_with_the_cap_or_without_compensation(make_model):
    """Oracle: a new certificate of the pruned weights; plain least squares does grow it."""
    model = make_model("maxmin", bias=False, width=16).float()
    dense = certify(model, tighten=False)
    naive = {}
    for comp in ("none", "lsq_capped", "lsq"):
        settings = CompressConfig(keep=0.4, comp=comp, ridge=1e-6)
        pruned = prune(model, tokens(), settings).model
        naive[comp] = certify(pruned, tighten=False).naive
    assert naive["none"] <= dense.naive
    assert naive["lsq_capped"] <= dense.naive * (1 + SINGLE)
    assert naive["lsq"] > dense.naive


def test_infinite_cap_is_plain_least_squares(make_model):
    """``tau=inf`` lifts the cap."""
    model = make_model("gelu")
    free, capped = (
        prune(model, tokens(), CompressConfig(comp=comp, tau=float("inf")))
        for comp in ("lsq", "lsq_capped")
    )
    for name, tensor in free.model.state_dict().items():
        assert torch.equal(tensor, capped.model.state_dict()[name])


def test_same_settings_give_the_same_weights(make_model):
    """Determinism, also of the random score; another seed gives another choice."""
    model = make_model("gelu")
    kept = [
        torch.cat(
            tuple(prune(model, tokens(), CompressConfig(score="random", seed=seed)).kept.values())
        ).tolist()
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_a_survey_gives_the_same_result_as_none(make_model):
    """Handing over the statistics saves a pass and changes nothing."""
    model = make_model("maxmin")
    settings = CompressConfig(order="one_shot", keep=0.5)
    found = survey(adapter_for(model), tokens(), settings, keeps=(0.3,))
    first = prune(model, tokens(), settings)
    second = prune(model, tokens(), settings, found=found)
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(tensor, second.model.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_moving_the_bias_lowers_the_error(make_model):
    """The bias absorbs the mean of what is removed; nothing else is as free."""
    model = make_model("relu")
    errors = []
    for bias in (False, True):
        settings = CompressConfig(keep=0.4, comp="none", bias=bias, score="energy", ridge=1e-4)
        pruning = prune(model, tokens(), settings)
        errors.append(measure_deviation(model, pruning.model, tokens(seed=5)).logits)
    assert errors[1] < errors[0]


def test_compensation_helps_on_text(make_model):
    """Largest deviation on other text: least squares below the cap below nothing."""
    model = make_model("gelu", width=16)
    found = {}
    for comp in ("none", "lsq_capped", "lsq"):
        pruning = prune(model, tokens(200), CompressConfig(keep=0.75, comp=comp))
        found[comp] = measure_deviation(model, pruning.model, tokens(seed=9)).logits
    assert found["lsq"] <= found["lsq_capped"] <= found["none"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_heads_go_in_groups_under_their_own_budget(make_model, order, kv_heads):
    """Half the groups of every layer; neurons stay bit for bit, or lose their own share."""
    model = make_model("maxmin", heads=4, kv_heads=kv_heads, content_heads=2, head_dim=4)
    for keep in (1.0, 0.5):
        settings = CompressConfig(keep=keep, keep_heads=0.5, order=order, ridge=1e-4)
        pruned = prune(model, tokens(), settings)
        for index in range(2):
            layer = pruned.model.config.layer(index)
            assert (layer.kv_heads, layer.heads) == (kv_heads // 2, 2)
            assert layer.mlp_width == keep * model.config.layer(index).mlp_width
        if keep == 1.0:
            name = "layers.1.mlp.down.weight"
            assert torch.equal(pruned.model.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("content_heads", [0, 2, 4])
def test_capped_heads_do_not_grow_the_naive_certificate(make_model, content_heads):
    """Oracle: a new certificate."""
    for seed in range(4):
        model = make_model(
            "relu", bias=False, width=16, heads=4, content_heads=content_heads, seed=seed
        ).float()
        dense = certify(model, tighten=False).naive
        pruned = {}
        for comp in ("none", "lsq_capped"):
            settings = CompressConfig(keep=1.0, keep_heads=0.5, comp=comp, ridge=1e-6)
            pruned[comp] = certify(prune(model, tokens(), settings).model, tighten=False).naive
        assert pruned["none"] <= dense
        assert pruned["lsq_capped"] <= dense * (1 + SINGLE)


def test_a_survey_reaches_places_that_only_further_budgets_prune(make_model):
    """Oracle: pruning at that budget without the survey."""
    model = make_model("relu", heads=4)
    settings = CompressConfig(keep=1.0, keep_heads=0.5, order="one_shot", ridge=1e-4)
    found = survey(adapter_for(model), tokens(), settings, keeps=[0.25])
    other = dataclasses.replace(settings, keep=0.25)
    expected = prune_model(model, tokens(), other).model.state_dict()
    state = prune_model(model, tokens(), other, found=found).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_budget_of_heads_needs_heads():
    """Oracle: the message; a classifier has none."""
    images = torch.rand(32, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"compress\.keep_heads=0\.5: expected heads"):
        prune_model(LipschitzMLP((6, 8, 3)), images, CompressConfig(keep=0.5, keep_heads=0.5))


def test_certified_allocation_needs_a_certificate(make_model):
    """The remedy is in the message."""
    with pytest.raises(ConfigError, match="choose uniform"):
        prune_model(make_model(), tokens(), CompressConfig(allocation="certified"))
