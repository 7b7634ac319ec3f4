"""Unlearning whole models: classifiers, chains with BatchNorm, transformers."""

import copy

import pytest
import torch

from common.errors import ConfigError
from common.models import LipschitzMLP
from common.norms import spectral_norm
from compress.adapters import adapter_for
from compress.unlearning.edits import EDITS
from compress.unlearning.measure import accuracy
from compress.unlearning.samples import image_classes
from compress.unlearning.settings import UnlearnConfig
from compress.unlearning.unlearner import chosen_targets, unlearn_model
from solvers.bounds import certify

CAP_ROUNDING = 1e-6  # relative, of float32 weights


def _tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(11, (count, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("digit", [1, 8])
@pytest.mark.parametrize("order", ["sequential", "one_shot"])
def test_ridge_forgets_a_digit_and_keeps_the_others(classifier, digits, digit, order):
    """Oracle: the specification's prototype: forget below .1, here .2; retain within 2 points."""
    settings = UnlearnConfig(forget=digit, order=order)
    data = image_classes(digits, settings)
    found = unlearn_model(classifier, data.forget_train.inputs, data.retain_train.inputs, settings)
    assert accuracy(classifier, data.forget_held) > 0.8
    assert accuracy(found.model, data.forget_held) < 0.2
    loss = accuracy(classifier, data.retain_held) - accuracy(found.model, data.retain_held)
    assert loss < 0.02


@pytest.mark.parametrize("method", EDITS)
@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_naive_constants_of_transformers_do_not_grow(make_model, method, activation):
    """Oracle: the certificate of the new weights, block by block and as a whole."""
    model = make_model(activation).float()
    settings = UnlearnConfig(forget="x", method=method, share=0.3, mu=1.0, layers=1.0, heads=True)
    found = unlearn_model(model, _tokens(20, 0).clamp(max=4), _tokens(20, 1), settings)
    old, new = certify(model, tighten=False), certify(found.model, tighten=False)
    assert new.naive <= old.naive * (1 + CAP_ROUNDING)
    for before, after in zip(old.blocks, new.blocks, strict=True):
        assert after.naive <= before.naive * (1 + CAP_ROUNDING)
    assert not torch.equal(found.model(_tokens(2, 2)), model(_tokens(2, 2)))


def test_without_a_cap_the_constant_grows(make_model):
    """Oracle: negation of single weights; the test above would otherwise show nothing."""
    model = make_model("gelu").float()
    settings = UnlearnConfig(forget="x", method="negate", share=0.3, layers=1.0, tau=float("inf"))
    found = unlearn_model(model, _tokens(20, 0).clamp(max=4), _tokens(20, 1), settings)
    assert max(edited.growth for edited in found.maps) > 1.01
    growth = certify(found.model, tighten=False).naive / certify(model, tighten=False).naive
    assert growth > 1.001


@pytest.mark.parametrize("order", ["sequential", "one_shot"])
def test_no_weight_on_the_class_is_a_no_op(make_model, order):
    """Oracle: ``mu = 0`` leaves every tensor bit for bit; the model given is never modified."""
    model = make_model("maxmin").float()
    before = copy.deepcopy(model.state_dict())
    settings = UnlearnConfig(forget="x", mu=0.0, layers=1.0, heads=True, order=order)
    found = unlearn_model(model, _tokens(8, 0), _tokens(8, 1), settings)
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert [edited.change for edited in found.maps] == [0.0] * 4


@pytest.mark.parametrize(
    ("layers", "heads", "names"),
    [
        (0.5, False, ["layers.1.mlp"]),
        (1.0, False, ["layers.0.mlp", "layers.1.mlp"]),
        (0.5, True, ["layers.1.heads", "layers.1.mlp"]),
        (0.01, True, ["layers.1.heads", "layers.1.mlp"]),
    ],
)
def test_the_last_maps_are_chosen(make_model, layers, heads, names):
    """Oracle: by hand."""
    settings = UnlearnConfig(forget="x", layers=layers, heads=heads)
    found = chosen_targets(adapter_for(make_model("relu")), settings)
    assert [target.name for target in found] == names


def test_only_the_last_map_is_pushed(classifier, digits):
    """Oracle: the same hidden map without a push; a pushed one would return in the next map."""
    maps = []
    for push in (0.0, 1.0):
        settings = UnlearnConfig(forget=5, push=push, layers=1.0)
        data = image_classes(digits, settings)
        parts = (data.forget_train.inputs, data.retain_train.inputs)
        maps.append(unlearn_model(classifier, *parts, settings).maps)
    assert torch.equal(maps[0][0].weight_IO, maps[1][0].weight_IO)
    assert not torch.equal(maps[0][1].weight_IO, maps[1][1].weight_IO)


def test_earlier_layers_stay_untouched(make_model):
    """Oracle: equality of every tensor but the chosen one."""
    model = make_model("relu").float()
    settings = UnlearnConfig(forget="x", mu=1.0, heads=False)
    found = unlearn_model(model, _tokens(8, 0), _tokens(8, 1), settings)
    state = found.model.state_dict()
    changed = [
        name for name, old in model.state_dict().items() if not torch.equal(state[name], old)
    ]
    assert changed == ["layers.1.mlp.down.weight"]


def test_a_chain_with_batch_norm_forgets(digits):
    """Oracle: a convolutional net of plain torch, edited at its channels and its last map."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(digits.train_NI), digits.train_labels_N)
        loss.backward()
        optimizer.step()
    model.eval()
    settings = UnlearnConfig(forget=0, layers=1.0)
    data = image_classes(digits, settings)
    found = unlearn_model(model, data.forget_train.inputs, data.retain_train.inputs, settings)
    assert [edited.target.kind for edited in found.maps] == ["channels", "channels"]
    assert accuracy(model, data.forget_held) > 0.8
    assert accuracy(found.model, data.forget_held) < 0.3
    assert accuracy(found.model, data.retain_held) > accuracy(model, data.retain_held) - 0.05


def test_recovered_models_keep_both_states(classifier, digits):
    """Oracle: the edited model is that of a run without recovery."""
    settings = UnlearnConfig(forget=2, method="neurons", layers=1.0)
    data = image_classes(digits, settings)
    parts = (data.forget_train.inputs, data.retain_train.inputs)
    plain = unlearn_model(classifier, *parts, settings)
    both = unlearn_model(
        classifier, *parts, UnlearnConfig(forget=2, method="neurons", layers=1.0, recovery="lsq")
    )
    assert plain.model is plain.edited
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(both.edited.state_dict()[name], tensor)
    adapter = adapter_for(both.model)
    for edited in both.maps:
        old = spectral_norm(adapter_for(classifier).weight(edited.target))
        assert spectral_norm(adapter.weight(edited.target)) <= old * (1 + CAP_ROUNDING)


def test_a_model_without_hidden_layers_is_refused():
    """Oracle: a linear classifier has no map behind a hidden layer."""
    with pytest.raises(ConfigError, match="no map in it can be edited"):
        unlearn_model(
            LipschitzMLP((64, 10)), torch.rand(4, 64), torch.rand(4, 64), UnlearnConfig(forget=0)
        )
