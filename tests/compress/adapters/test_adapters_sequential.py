"""Chains of maps and convolutions: rows, cuts, counts, BatchNorm, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import ConfigError, LipError
from compress.adapters import SequentialAdapter, adapter_for
from compress.adapters.base import Stage
from compress.fit import fit_target
from compress.pruner import Pruning, prune_model
from compress.settings import CompressConfig
from compress.statistics.collect import collect, run

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative: a cut only changes the order of sums."""


def cnn(dtype: torch.dtype = torch.float64, *, seed: int = 0, flat_norm: bool = False):
    """Return a nested CNN with strides, dilation, pooling and every number of BatchNorm drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            nn.GELU(),
            nn.MaxPool2d(2),
        )
        flat = [nn.BatchNorm1d(24, affine=False)] if flat_norm else []
        head = (nn.Linear(24, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(), nn.Linear(10, 4))
        model = nn.Sequential(body, nn.Flatten(), *flat, *head).to(dtype)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 2.0)
                if layer.affine:
                    nn.init.uniform_(layer.weight, 0.5, 1.5)
                    nn.init.normal_(layer.bias, std=0.3)
    return model.eval()


def images(count: int = 40, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return Gaussian images (count, 2, 6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 8, generator=generator, dtype=dtype)


def some_kept(adapter) -> dict[str, torch.Tensor]:
    """Return every second component of every target, the last one always."""
    kept = {}
    for target in adapter.targets():
        components = torch.arange(target.components - 1, -1, -2).flip(0)
        offsets = torch.arange(target.unit)
        kept[target.name] = (components[:, None] * target.unit + offsets).flatten()
    return kept


def masked(adapter, kept):
    """Return a copy of the model with the removed rows of every map set to zero."""
    copied = adapter.working_copy()
    for target in copied.targets():
        weight_IO = torch.zeros_like(copied.weight(target))
        weight_IO[kept[target.name]] = copied.weight(target)[kept[target.name]]
        copied.write(target, weight_IO)
    return copied.model


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the relative l2 distance."""
    return float(((first - second).norm() / second.norm()).detach())


@pytest.mark.parametrize("flat_norm", [False, True], ids=["plain", "flat_norm"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
def test_cut_model_equals_the_masked_one(dtype, flat_norm):
    """Oracle: the full-size model whose removed inputs are multiplied by zero."""
    adapter = adapter_for(cnn(dtype, flat_norm=flat_norm))
    kept = some_kept(adapter)
    small = adapter.cut(kept)
    x = images(dtype=dtype)
    assert relative(small(x), masked(adapter, kept)(x)) < TOLERANCE[dtype]
    assert relative(small(x), adapter.model(x)) > 1e-2


def test_cut_layers_know_their_sizes():
    """Oracle: the sizes that follow from the kept components, and PyTorch's own strict loading."""
    adapter = adapter_for(cnn(flat_norm=True))
    small = adapter.cut(some_kept(adapter))
    first, norm, _, second, *_ = small[0]
    assert (first.out_channels, norm.num_features, second.in_channels) == (3, 3, 3)
    assert (second.out_channels, small[2].num_features, small[3].in_features) == (4, 12, 12)
    assert small[3].out_features == small[4].num_features == small[7].in_features == 5
    for layer in small.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fresh = type(layer)(*_sizes(layer), bias=layer.bias is not None)
            fresh.load_state_dict(layer.state_dict())


def _sizes(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size


def test_rows_times_weight_is_the_map():
    """Oracle: PyTorch's convolution with stride, padding and dilation; the linear layers too."""
    adapter = adapter_for(cnn())
    for target in adapter.targets():
        module, found = adapter.module(target), []
        with module.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0])):
            adapter.model(images(5))
        rows = adapter.rows(target, found[0])
        expected = module(found[0])
        if isinstance(module, nn.Conv2d):
            expected = expected.flatten(2).transpose(1, 2)
        assert rows.shape[-1] == target.inputs
        own = rows @ adapter.weight(target) + adapter.bias(target)
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_write_puts_back_what_weight_gave():
    """Oracle: the state before; and a doubled weight is twice the old one."""
    adapter = adapter_for(cnn())
    before = copy.deepcopy(adapter.model.state_dict())
    for target in adapter.targets():
        adapter.write(target, adapter.weight(target), adapter.bias(target))
    assert all(torch.equal(before[name], new) for name, new in adapter.model.state_dict().items())
    target = adapter.targets()[0]
    adapter.write(target, 2 * adapter.weight(target))
    assert torch.equal(adapter.module(target).weight, 2 * before[f"{target.name}.weight"])


@pytest.mark.parametrize("flat_norm", [False, True], ids=["plain", "flat_norm"])
def test_parameters_of_a_component_are_what_a_cut_saves(flat_norm):
    """Oracle: counting the parameters of the model with one component less."""
    model = cnn(flat_norm=flat_norm)
    if flat_norm:
        model[2] = nn.BatchNorm1d(24).double().eval()
    adapter = adapter_for(model)
    for target in adapter.targets():
        small = adapter.cut({target.name: torch.arange(target.inputs - target.unit)})
        saved = sum(p.numel() for p in model.parameters())
        saved -= sum(p.numel() for p in small.parameters())
        assert target.params == saved


def test_operations_of_a_component_are_what_a_cut_saves():
    """Oracle: PyTorch's own counter of operations on one image (2 per multiply-add)."""

    def count(model) -> int:
        with FlopCounterMode(display=False) as counter:
            model(images(1))
        return counter.get_total_flops()

    adapter = adapter_for(cnn(), images(1))
    for target in adapter.targets():
        small = adapter.cut({target.name: torch.arange(target.inputs - target.unit)})
        assert target.flops == count(adapter.model) - count(small)


def test_operations_without_an_example_are_unknown_only_beside_convolutions():
    """Oracle: definition; a linear chain needs no example."""
    flops = [target.flops for target in adapter_for(cnn()).targets()]
    assert [value != value for value in flops] == [True, True, False]


def test_stages_and_listening_agree_with_the_forward_pass():
    """Oracle: the model's own output, and the rows' Gram formed by hand."""
    adapter = adapter_for(cnn())
    x = images()
    torch.testing.assert_close(run(adapter, x), adapter.model(x), rtol=0, atol=0)
    targets = adapter.targets()
    named = [name for stage in adapter.stages() for name in stage.targets]
    assert named == [target.name for target in targets]
    moments = collect(adapter, x, targets, holdout=0.0).fitted[targets[0].name]
    columns = F.unfold(adapter.model[0][:3](x), (3, 2), (1, 2), (1, 0), (2, 1)).transpose(1, 2)
    rows = columns.flatten(0, 1)
    torch.testing.assert_close(moments.gram_II(), rows.T @ rows / len(rows))


def test_training_mode_is_put_aside_and_kept():
    """Oracle: the same model in evaluation mode; modes and buffers stay as they were."""
    model = cnn().train()
    before = copy.deepcopy(model.state_dict())
    pruning = prune_model(model, images(), CompressConfig(keep=0.5))
    expected = prune_model(cnn(), images(), CompressConfig(keep=0.5))
    assert all(layer.training for layer in [*model.modules(), *pruning.model.modules()])
    assert all(torch.equal(before[name], new) for name, new in model.state_dict().items())
    torch.testing.assert_close(pruning.model.eval()(images()), expected.model(images()))


@pytest.mark.parametrize("order", ["sequential", "one_shot"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
def test_keeping_everything_changes_no_bit(dtype, order):
    """Oracle: the model itself, BatchNorm buffers included."""
    model = cnn(dtype)
    kept = prune_model(model, images(dtype=dtype), CompressConfig(keep=1.0, order=order)).model
    state = kept.state_dict()
    assert all(torch.equal(state[name], old) for name, old in model.state_dict().items())
    assert torch.equal(kept(images(dtype=dtype)), model(images(dtype=dtype)))


def test_duplicated_channels_go_at_no_cost():
    """Oracle: a twin of every channel of the first convolution carries nothing of its own."""
    model = cnn()
    first, norm = model[0][0], model[0][1]
    with torch.no_grad():
        for tensor in (first.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[3:] = tensor[:3]
    settings = CompressConfig(keep=0.5, ridge=1e-10, min_keep=0.5)
    small = _prune_only(model, {"0.3": 0.5}, settings).model
    assert small[0][0].out_channels == 3
    assert relative(small(images(seed=2)), model(images(seed=2))) < 1e-6


def _prune_only(model, names, settings):
    """Prune some targets of a chain: the others are hidden from the pruner."""
    adapter = adapter_for(model)
    found = collect(adapter, images(200), adapter.targets(), holdout=0.0)
    fits = []
    for target in adapter.targets():
        if target.name in names:
            count = round(names[target.name] * target.components)
            moments = found.fitted[target.name]
            fits.append(fit_target(adapter, target, moments, moments, count, settings))
    copied = adapter.working_copy()
    for fit in fits:
        copied.write(fit.target, fit.weight_IO)
    small = copied.cut({fit.target.name: fit.kept_K for fit in fits})
    return Pruning(model=small, fits=tuple(fits))


def test_scalars_per_kernel_are_weaker_than_least_squares_on_taps():
    """Oracle: the order of the spec (4.1); strict on kernels, equal on single inputs."""
    model = cnn()
    errors = {}
    for comp in ("none", "delta", "lsq"):
        settings = CompressConfig(keep=0.5, comp=comp, ridge=1e-10, score="energy")
        fits = _prune_only(model, {"0.3": 0.5, "6": 0.5}, settings).fits
        errors[comp] = [fit.error for fit in fits]
    assert errors["lsq"][0] < 0.99 * errors["delta"][0]
    assert errors["delta"][0] < errors["none"][0]
    torch.testing.assert_close(errors["lsq"][1], errors["delta"][1], rtol=1e-6, atol=0)


def test_recalibration_restores_the_statistics_of_what_really_arrives():
    """Oracle: mean and unbiased variance of the layer's input, computed in one go."""
    adapter = adapter_for(cnn())
    target, x = adapter.targets()[1], images(60)
    stages = adapter.stages()
    before = stages[1].run(stages[0].run(x))
    adapter.recalibrate(stages[2], [before])
    norm = adapter.model[3]
    untouched = norm.running_mean.clone()
    adapter.write(target, adapter.weight(target) * 0.5)
    adapter.recalibrate(stages[2], list(before.split(17)))
    arriving = adapter.module(target)(before)
    torch.testing.assert_close(norm.running_mean, arriving.mean(0))
    torch.testing.assert_close(norm.running_var, arriving.var(0))
    assert not torch.equal(norm.running_mean, untouched)
    assert torch.equal(untouched, cnn()[3].running_mean)


def test_recalibration_leaves_layers_before_the_change_alone():
    """Oracle: the buffers before; the norm ahead of the first changed map saw no change."""
    model = cnn()
    pruning = prune_model(model, images(60), CompressConfig(keep=0.5))
    first, kept_K = pruning.model[0][1], pruning.fits[0].kept_K
    channels = kept_K[::6] // 6
    assert torch.equal(first.running_mean, model[0][1].running_mean[channels])
    assert not torch.isin(pruning.model[3].running_var, model[3].running_var).any()


class Residual(nn.Module):
    """A block whose forward is not the chain of its children."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input plus the branch."""
        return x + self.inner(x)


def _shared() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


BROKEN = {
    "residual": (lambda: nn.Sequential(nn.Linear(4, 4), Residual()), "layer 1 .Residual"),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)),
        "layer 1 .Softmax",
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))),
        "layer 0.0 .Conv2d.: groups=2",
    ),
    "unflattened": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(4, 2)),
        "layer 2 .Linear",
    ),
    "batch_statistics": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)
        ),
        "layer 1 .BatchNorm1d",
    ),
    "shared": (_shared, "2.weight is the same tensor as 0.weight"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_unsupported_layers_are_named(name):
    """Oracle: one line that names the layer."""
    build, message = BROKEN[name]
    with pytest.raises(ConfigError, match=message) as caught:
        SequentialAdapter(build())
    assert "\n" not in str(caught.value)


def test_statistics_of_a_single_number_are_refused():
    """Oracle: no unbiased variance of one sample."""
    adapter = adapter_for(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).eval())
    target = adapter.targets()[0]
    adapter.write(target, 2 * adapter.weight(target))
    stage: Stage = adapter.stages()[1]
    with pytest.raises(ValueError, match="more images"):
        adapter.recalibrate(stage, [torch.zeros(1, 3)])


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (nn.Sequential(), 8, "Sequential: nothing in it can be pruned"),
        (nn.Sequential(nn.Linear(4, 2)), 8, "Sequential: nothing in it can be pruned"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0, "0 calibration sequences"),
    ],
    ids=["no-layer", "one-map", "no-image"],
)
def test_nothing_to_do_is_named(model, images, message):
    """Oracle: the message of a mistake, not a traceback of its consequences."""
    with pytest.raises(LipError, match=message):
        prune_model(model, torch.zeros(images, 4), CompressConfig(keep=0.5))
