"""Certified change of classifiers: attacks, exactness, refusals, and the report."""

import dataclasses
import json
import math

import pytest
import torch

from common.errors import CertificateError
from common.images import Images
from common.models import LipschitzMLP
from common.models.classifier import MLP_ACTIVATIONS
from compress.classifier_report import classifier_report
from compress.deviation.classifier import classifier_deviation
from compress.pruner import prune_model
from compress.settings import CompressConfig
from solvers.bounds.classifier import certify_classifier

STEPS, STARTS = 80, 32


def make(activation: str, *, bias: bool = True, dtype=torch.float64, seed: int = 0):
    """Return a small MLP with nonzero biases and norms near 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LipschitzMLP((9, 14, 12, 4), activation, bias).to(dtype)
        with torch.no_grad():
            for linear in model.linears:
                linear.weight.normal_()
                linear.weight.div_(torch.linalg.matrix_norm(linear.weight, 2))
                if bias:
                    linear.bias.normal_(std=0.3)
    return model.eval()


def pixels(count: int = 200, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    """Return images (count, 9) of the unit box."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 9, generator=generator, dtype=dtype)


def labelled(model) -> Images:
    """Return random images whose classes are mostly the model's own."""
    x = pixels(100, 2).float()
    labels = model.float()(x).argmax(1)
    labels[::5] = 0
    return Images(train_NI=x, train_labels_N=labels, val_NI=x, val_labels_N=labels, classes=4)


def attack(dense, pruned) -> float:
    """Return the largest RMS change found by projected gradient ascent over the box."""
    x = torch.cat([pixels(STARTS - 2, 3), torch.zeros(1, 9), torch.ones(1, 9)]).double()
    largest = 0.0
    for step in range(STEPS):
        x.requires_grad_()
        moved = (dense(x) - pruned(x)).square().mean(1).sqrt()
        largest = max(largest, float(moved.detach().max()))
        (slope,) = torch.autograd.grad(moved.sum(), x)
        x = (x + 0.1 * (1 - step / STEPS) * slope.sign()).clamp(0, 1).detach()
    return largest


@pytest.mark.parametrize("comp", ["none", "lsq", "lsq_capped"])
@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_no_attack_exceeds_either_form(activation, comp):
    """Oracle: projected gradient ascent over the box of images, corners included."""
    model = make(activation)
    settings = CompressConfig(keep=0.5, comp=comp)
    pruning = prune_model(model, pixels(), settings)
    found = attack(model, pruning.model)
    deviation = classifier_deviation(model, pruning)
    assert 0 < found <= min(deviation.form_a.bound, deviation.form_b.bound)
    assert deviation.bound <= 30 * found


@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_moved_biases_are_bounded_too(activation):
    """Oracle: the same attack where the bias absorbs the mean of what went."""
    model = make(activation)
    pruning = prune_model(model, pixels(), CompressConfig(keep=0.5, bias=True))
    assert attack(model, pruning.model) <= classifier_deviation(model, pruning).bound


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_nothing_changed_is_exactly_zero(activation, bias):
    """Oracle: the model against itself."""
    model = make(activation, bias=bias)
    pruning = prune_model(model, pixels(), CompressConfig(keep=1.0))
    assert classifier_deviation(model, pruning).bound == 0.0


def test_neurons_that_nothing_reads_go_without_effect():
    """Oracle: exactly those neurons are removed, and the bound is exactly 0."""
    model = make("abs")
    with torch.no_grad():
        model.linears[1].weight[:, 7:] = 0
        model.linears[2].weight[:, 6:] = 0
    pruning = prune_model(model, pixels(), CompressConfig(keep=0.5, comp="none"))
    assert pruning.model.sizes == (9, 7, 6, 4)
    assert classifier_deviation(model, pruning).bound == 0.0


def test_linear_change_is_met_closely():
    """Oracle: tanh of tiny inputs is linear; there the bound is the norm of a matrix times 1.5."""
    model = make("tanh", bias=False)
    with torch.no_grad():
        model.linears[0].weight.mul_(1e-3)
    pruning = prune_model(model, pixels(), CompressConfig(keep=0.5, comp="none"))
    deviation = classifier_deviation(model, pruning)
    w0, w1, w2 = (linear.weight.detach() for linear in model.linears)
    v0, v1, v2 = (linear.weight.detach() for linear in pruning.model.linears)
    change = w2 @ w1 @ w0 - v2 @ v1 @ v0
    most = float(torch.linalg.matrix_norm(change, 2)) * 3.0 / math.sqrt(4)
    assert attack(model, pruning.model) <= deviation.bound <= 6 * most


def test_effort_never_loosens_and_norms_may_be_given():
    """Oracle: the bound without a search; and the norms that a certificate holds."""
    model = make("relu")
    pruning = prune_model(model, pixels(), CompressConfig(keep=0.5))
    cheap, good = (classifier_deviation(model, pruning, max_evals=n).bound for n in (0, 20))
    assert good <= cheap * (1 + 1e-9)
    norms = certify_classifier(model, tighten=False).norms
    assert classifier_deviation(model, pruning, norms=norms).bound == pytest.approx(good, rel=1e-6)


def test_another_model_is_refused():
    """Oracle: one weight moved after pruning, or another activation, voids the account."""
    model = make("relu")
    pruning = prune_model(model, pixels(), CompressConfig(keep=0.5))
    with torch.no_grad():
        pruning.model.linears[0].weight[0, 0] += 1e-9
    with pytest.raises(CertificateError, match="not those of the pruning"):
        classifier_deviation(model, pruning)
    other = LipschitzMLP(pruning.model.sizes, "abs").double()
    with pytest.raises(CertificateError, match="not those of the pruning"):
        classifier_deviation(model, dataclasses.replace(pruning, model=other))


def test_report_holds_everything_in_order():
    """Oracle: measured <= bound per image <= bound for all; counts and accuracies by hand."""
    model = make("maxmin", dtype=torch.float32)
    settings = CompressConfig(keep=0.5, tau=math.inf)
    images = labelled(model)
    pruning = prune_model(model, pixels(dtype=torch.float32), settings)
    report = classifier_report(model, pruning, images, certify_classifier(model), settings)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    x, labels = images.val_NI.double(), images.val_labels_N
    old, new = model.double()(x).detach(), pruning.model.double()(x).detach()
    moved = float((old - new).square().mean(1).sqrt().max())
    assert content["measured_deviation"] == pytest.approx(moved, rel=1e-9)
    assert moved <= content["semi_empirical_deviation"] <= content["certified_deviation"]
    assert content["settings"]["tau"] == "inf"
    accuracy = content["accuracy"]
    assert accuracy["before"] == float((old.argmax(1) == labels).double().mean()) >= 0.8
    assert accuracy["after"] == float((new.argmax(1) == labels).double().mean())
    params = content["size"]["params"]["model"]
    assert params == {"before": model.num_parameters, "after": pruning.model.num_parameters}
    assert content["certificate"]["after"]["naive"] == report.after.naive
    assert set(report.metrics()) >= {"compress/val_accuracy", "compress/certified_deviation"}


def test_proved_classes_stay():
    """Oracle: every image whose class the report proves has the same class after pruning."""
    model = make("relu", dtype=torch.float32)
    settings = CompressConfig(keep=0.75)
    pruning = prune_model(model, pixels(dtype=torch.float32), settings)
    report = classifier_report(model, pruning, labelled(model), certify_classifier(model), settings)
    assert 0 < report.images_top1 <= report.seen.top1_agreement
    assert report.certified_top1 <= report.images_top1


@pytest.mark.parametrize("activation", MLP_ACTIVATIONS)
def test_bounds_that_every_image_reaches_are_not_refuted(activation):
    """Oracle: a first matrix of 0; the change is one constant, so both bounds are its size."""
    for seed in range(4):
        model = make(activation, dtype=torch.float32, seed=seed)
        with torch.no_grad():
            model.linears[0].weight.zero_()
            model.linears[0].bias.abs_()
        settings = CompressConfig(keep=0.5, comp="none")
        pruning = prune_model(model, pixels(dtype=torch.float32), settings)
        proof = certify_classifier(model, tighten=False)
        report = classifier_report(model, pruning, labelled(model), proof, settings)
        first, most = report.semi_empirical_deviation, report.certified_deviation
        assert 0 < first <= most * (1 + 1e-9)
        assert most <= first * (1 + 1e-3)


def test_measurements_above_a_bound_refute_it():
    """Oracle: norms that are far too small."""
    model = make("relu", dtype=torch.float32)
    settings = CompressConfig(keep=0.5)
    pruning = prune_model(model, pixels(dtype=torch.float32), settings)
    false = dataclasses.replace(certify_classifier(model), norms=(0.0, 0.0, 0.0))
    images = labelled(model)
    with pytest.raises(CertificateError, match="refuted"):
        classifier_report(model, pruning, images, false, settings)
