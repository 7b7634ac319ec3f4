"""Lipschitz MLPs: cuts, counts, and the cap that keeps the product of norms."""

import math

import pytest
import torch

from common.models import LipschitzMLP
from common.models.classifier import MLP_ACTIVATIONS
from common.norms import spectral_norm
from compress.adapters import adapter_for
from compress.budgets.allocate import ALLOCATORS
from compress.pruner import prune_model
from compress.settings import ORDERS, CompressConfig
from compress.statistics.collect import run
from solvers.bounds.classifier import certify_classifier

SIZES = (12, 16, 20, 6)
SINGLE = 1e-6


def make(activation: str = "relu", *, bias: bool = True, dtype=torch.float64, seed: int = 0):
    """Return an MLP with nonzero biases."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LipschitzMLP(SIZES, activation, bias).to(dtype)
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith("bias") else parameter.shape[-1] ** -0.5
            torch.nn.init.normal_(parameter, std=scale)
    return model.eval()


def pixels(count: int = 300, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    """Return images (count, 12) of the unit box."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, SIZES[0], generator=generator, dtype=dtype)


def product(model) -> float:
    """Return the product of the spectral norms."""
    return math.prod(spectral_norm(linear.weight) for linear in model.linears)


@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_cut_model_equals_the_masked_one(activation):
    """Oracle: the full-size model whose removed inputs are multiplied by zero."""
    adapter = adapter_for(make(activation))
    kept = {"linears.1": torch.arange(4, 12), "linears.2": torch.tensor([0, 1, 6, 7, 18, 19])}
    small, copied = adapter.cut(kept), adapter.working_copy()
    for target in copied.targets():
        weight_IO = copied.weight(target)
        removed = torch.ones(target.inputs, dtype=torch.bool)
        removed[kept[target.name]] = False
        weight_IO[removed] = 0
        copied.write(target, weight_IO)
    assert small.sizes == (12, 8, 6, 6)
    torch.testing.assert_close(small(pixels()), copied.model(pixels()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", ["tanh", "maxmin"])
def test_counts_of_a_component_are_what_a_cut_saves(activation, bias):
    """Oracle: counting parameters, and two operations per entry of a matrix."""
    adapter = adapter_for(make(activation, bias=bias))
    for target in adapter.targets():
        small = adapter.cut({target.name: torch.arange(target.inputs - target.unit)})
        assert target.params == adapter.model.num_parameters - small.num_parameters
        entries = [
            sum(linear.weight.numel() for linear in model.linears)
            for model in (adapter.model, small)
        ]
        assert target.flops == 2.0 * (entries[0] - entries[1])


@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_stages_are_the_forward_pass(activation):
    """Oracle: the model itself, on flat images and on images with axes."""
    model = make(activation)
    x = pixels(7)
    torch.testing.assert_close(run(adapter_for(model), x), model(x), rtol=0, atol=0)
    shaped = run(adapter_for(model), x.reshape(7, 1, 3, 4))
    torch.testing.assert_close(shaped, model(x), rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_keeping_everything_changes_no_bit(dtype, order):
    """Oracle: the model itself."""
    model = make("maxmin", dtype=dtype)
    kept = prune_model(model, pixels(), CompressConfig(keep=1.0, order=order)).model
    assert kept.config == model.config
    for old, new in zip(model.parameters(), kept.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("tau", [1.0, 1.25])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_product_of_norms_obeys_tau(activation, order, tau):
    """Oracle: SVD of all matrices; each of the two pruned ones may grow by ``tau``."""
    model = make(activation, dtype=torch.float32)
    settings = CompressConfig(keep=0.5, tau=tau, order=order, comp="lsq_capped", ridge=1e-4)
    small = prune_model(model, pixels(), settings).model
    assert small.num_parameters < 0.6 * model.num_parameters
    assert product(small) <= tau**2 * product(model)


def test_naive_certificate_does_not_grow_but_least_squares_lets_it():
    """Oracle: certified products of norms; images of few degrees of freedom tempt a free fit."""
    model = make("tanh", dtype=torch.float32)
    images = pixels() @ torch.diag(torch.linspace(0, 1, 12, dtype=torch.float64) ** 8)
    before = certify_classifier(model, tighten=False).naive
    default = prune_model(model, images, CompressConfig(keep=0.5, score="random")).model
    assert certify_classifier(default, tighten=False).naive <= before
    free = prune_model(model, images, CompressConfig(keep=0.5, comp="lsq", score="random")).model
    assert certify_classifier(free, tighten=False).naive > 1.5 * before


def test_duplicated_pairs_go_at_no_cost():
    """Oracle: a twin of every pair carries nothing of its own."""
    model = make("maxmin")
    with torch.no_grad():
        for tensor in (model.linears[0].weight, model.linears[0].bias):
            tensor[8:] = tensor[:8]
        for tensor in (model.linears[1].weight, model.linears[1].bias):
            tensor[10:] = tensor[:10]
    settings = CompressConfig(keep=0.5, comp="lsq", ridge=1e-10)
    small = prune_model(model, pixels(), settings).model
    assert small.sizes == (12, 8, 10, 6)
    torch.testing.assert_close(small(pixels(seed=2)), model(pixels(seed=2)), rtol=SINGLE, atol=1e-6)


@pytest.mark.parametrize("allocation", ALLOCATORS)
def test_every_allocation_meets_the_budget(allocation):
    """Oracle: the kept share of the parameters that components hold."""
    model = make("relu", dtype=torch.float32)
    gains = adapter_for(model).amplifications(certify_classifier(model, tighten=False))
    settings = CompressConfig(keep=0.5, allocation=allocation)
    pruning = prune_model(model, pixels(), settings, gains=gains)
    assert 0.5 <= pruning.removed_fraction < 0.65


def test_amplification_is_the_product_of_later_norms():
    """Oracle: SVD; and no change of a matrix's output moves the logits further."""
    model = make("abs")
    gains = adapter_for(model).amplifications(certify_classifier(model, tighten=False))
    norm = spectral_norm(model.linears[2].weight)
    assert gains["linears.2"] == 1.0
    assert norm <= gains["linears.1"] <= norm * (1 + 1e-6)


def test_gaussian_images_calibrate_too():
    """Oracle: on other Gaussian images a fit beats the weights as they were."""
    model = make("relu")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(900, 1, 3, 4, generator=generator, dtype=torch.float64)
    fitted, fresh = noise[:600], noise[600:].flatten(1)
    distance = {
        comp: float(
            (prune_model(model, fitted, CompressConfig(keep=0.75, comp=comp)).model(fresh))
            .sub(model(fresh))
            .detach()
            .norm()
        )
        for comp in ("none", "lsq")
    }
    assert distance["lsq"] < 0.8 * distance["none"]
