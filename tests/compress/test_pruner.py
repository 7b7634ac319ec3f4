"""Whole-model pruning: budget, order, cap, determinism."""

import pytest
import torch

from common.models.config import ACTIVATIONS
from compress.allocate import ALLOCATORS
from compress.fit import norm_cap
from compress.measure import measure_deviation
from compress.pruner import prune_model, survey
from compress.settings import ORDERS, CompressConfig
from solvers.bounds import certify

SINGLE = 1e-6
"""Relative; float32 weights, checked in float64."""


def tokens(count: int = 48, seed: int = 0) -> torch.Tensor:
    """Return random token sequences (count, 16)."""
    return torch.randint(11, (count, 16), generator=torch.Generator().manual_seed(seed))


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
    pruning = prune_model(model, certify(model, tighten=False), tokens(), settings)
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
    pruning = prune_model(model, certify(model, tighten=False), tokens(), settings)
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
        pruned = prune_model(model, dense, tokens(), settings).model
        naive[comp] = certify(pruned, tighten=False).naive
    assert naive["none"] <= dense.naive
    assert naive["lsq_capped"] <= dense.naive * (1 + SINGLE)
    assert naive["lsq"] > dense.naive


def test_infinite_cap_is_plain_least_squares(make_model):
    """``tau=inf`` lifts the cap."""
    model = make_model("gelu")
    certificate = certify(model, tighten=False)
    free, capped = (
        prune_model(model, certificate, tokens(), CompressConfig(comp=comp, tau=float("inf")))
        for comp in ("lsq", "lsq_capped")
    )
    for name, tensor in free.model.state_dict().items():
        assert torch.equal(tensor, capped.model.state_dict()[name])
    assert norm_cap(model.layers[0].mlp, torch.arange(4), float("inf")) == float("inf")


def test_same_settings_give_the_same_weights(make_model):
    """Determinism, also of the random score; another seed gives another choice."""
    model = make_model("gelu")
    certificate = certify(model, tighten=False)
    kept = [
        torch.cat(
            prune_model(
                model, certificate, tokens(), CompressConfig(score="random", seed=seed)
            ).kept
        ).tolist()
        for seed in (1, 1, 2)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_a_survey_gives_the_same_result_as_none(make_model):
    """Handing over the statistics saves a pass and changes nothing."""
    model = make_model("maxmin")
    certificate = certify(model, tighten=False)
    settings = CompressConfig(order="one_shot", keep=0.5)
    found = survey(model, tokens(), settings, keeps=(0.3,))
    first = prune_model(model, certificate, tokens(), settings)
    second = prune_model(model, certificate, tokens(), settings, found=found)
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(tensor, second.model.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_moving_the_bias_lowers_the_error(make_model):
    """The bias absorbs the mean of what is removed; nothing else is as free."""
    model = make_model("relu")
    certificate = certify(model, tighten=False)
    errors = []
    for bias in (False, True):
        settings = CompressConfig(keep=0.4, comp="none", bias=bias, score="energy", ridge=1e-4)
        pruning = prune_model(model, certificate, tokens(), settings)
        errors.append(measure_deviation(model, pruning.model, tokens(seed=5)).logits)
    assert errors[1] < errors[0]


def test_compensation_helps_on_text(make_model):
    """Largest deviation on other text: least squares below the cap below nothing."""
    model = make_model("gelu", width=16)
    certificate = certify(model, tighten=False)
    found = {}
    for comp in ("none", "lsq_capped", "lsq"):
        pruning = prune_model(model, certificate, tokens(200), CompressConfig(keep=0.75, comp=comp))
        found[comp] = measure_deviation(model, pruning.model, tokens(seed=9)).logits
    assert found["lsq"] <= found["lsq_capped"] <= found["none"]
