"""Class unlearning against retraining: digits, every class in turn, one row per method and figure.

Figures are means over the ten classes of a 64-128-128-10 ReLU MLP: accuracy on held-out images of
the forgotten class and of the others, membership inference (0.5 is guessing), steps of fine-tuning
that bring half of the class back (on retained images, on 16 images of the class; the limit where
they do not), a linear probe of the hidden layer, wall seconds. ``base`` is the trained model.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from common.images import load_digits
from common.models import LipschitzMLP
from compress.unlearning.measure import accuracy, losses, probe
from compress.unlearning.membership import attack_membership
from compress.unlearning.relearning import relearning_steps
from compress.unlearning.samples import ClassData, Samples, image_classes, shuffled
from compress.unlearning.settings import UnlearnConfig
from compress.unlearning.unlearner import unlearn_model

CLASSES = 10
STEPS, BATCH, LR = 300, 128, 1e-3
ASCENT_STEPS, ASCENT_LR = 15, 1e-3
RELEARN_STEPS, RELEARN_LR = 30, 1e-3
RETAIN_LOSS, FORGET_LEFT = 0.02, 0.1  # points of accuracy that the default may lose and leave

FREE = {"tau": float("inf")}
EDITS: dict[str, dict[str, Any]] = {
    **{
        f"{method} p={share}, {where}": {"method": method, "share": share, "layers": layers} | FREE
        for method in ("zero", "rowsum", "contrast", "negate", "neurons")
        for share in (0.05, 0.1, 0.2, 0.4)
        for where, layers in (("both", 1.0), ("last", 0.5))
    },
    "neurons p=0.2 + recovery, both": {
        "method": "neurons",
        "layers": 1.0,
        "recovery": "lsq",
        **FREE,
    },
    **{
        f"ridge mu={mu} push={push}, {where}": {"mu": mu, "push": push, "layers": layers} | FREE
        for mu in (0.05, 0.1, 0.3, 0.5)
        for push in (0.0, 1.0)
        for where, layers in (("both", 1.0), ("last", 0.5))
    },
    "ridge capped, both": {"layers": 1.0},
    "default (ridge capped, last)": {},
}


def _train(samples: list[Samples], steps: int = STEPS) -> LipschitzMLP:
    """Return a new model trained on all samples."""
    torch.manual_seed(0)
    model = LipschitzMLP((64, 128, 128, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    pixels_NI = torch.cat([part.inputs for part in samples])
    labels_N = torch.cat([part.targets for part in samples])
    for _ in range(steps):
        index_B = torch.randint(len(labels_N), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(pixels_NI[index_B]), labels_N[index_B]).backward()
        optimizer.step()
    return model.eval()


def _ascend(base: LipschitzMLP, data: ClassData) -> LipschitzMLP:
    """Return the model after steps up the gradient of the loss on the class."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=ASCENT_LR, maximize=True)
    for _ in range(ASCENT_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(data.forget_train.inputs), data.forget_train.targets).backward()
        optimizer.step()
    return model


def _edit(base: LipschitzMLP, data: ClassData, changes: dict[str, Any]) -> LipschitzMLP:
    settings = UnlearnConfig(forget=0, **changes)
    parts = (data.forget_train.inputs, data.retain_train.inputs)
    return unlearn_model(base, *parts, settings).model


def _steps(base: LipschitzMLP, model: LipschitzMLP, train: Samples, data: ClassData) -> int:
    held = data.forget_held
    found = relearning_steps(base, model, train, held, limit=RELEARN_STEPS, lr=RELEARN_LR)
    return RELEARN_STEPS if found is None else found


def _figures(base: LipschitzMLP, model: LipschitzMLP, data: ClassData) -> dict[str, float]:
    trained, held = (losses(model, part) for part in (data.forget_train, data.forget_held))
    return {
        "forget": accuracy(model, data.forget_held),
        "retain": accuracy(model, data.retain_held),
        "membership": attack_membership(trained, held).auc,
        "probe": probe(model, data),
        "relearn on retained": _steps(base, model, data.retain_train, data),
        "relearn on 16": _steps(base, model, shuffled(data.forget_train, 16, 0), data),
    }


@pytest.fixture(scope="module")
def classes() -> list[ClassData]:
    """Return the digits divided by each class in turn."""
    images = load_digits()
    return [image_classes(images, UnlearnConfig(forget=digit)) for digit in range(CLASSES)]


@pytest.fixture(scope="module")
def base(classes: list[ClassData]) -> LipschitzMLP:
    """Return the model trained on everything."""
    return _train([classes[0].forget_train, classes[0].retain_train])


def _measure(
    bench: Any, name: str, base: LipschitzMLP, classes: list[ClassData], make: Callable
) -> dict[str, float]:
    """Add a row per figure; return the means."""
    rows: dict[str, list[float]] = {}
    for data in classes:
        began = time.perf_counter()
        model = make(data)
        seconds = time.perf_counter() - began
        for figure, value in (_figures(base, model, data) | {"seconds": seconds}).items():
            rows.setdefault(figure, []).append(float(value))
    means = {figure: statistics.mean(values) for figure, values in rows.items()}
    for figure, values in rows.items():
        unit = {"seconds": "s"}.get(figure, "steps" if "relearn" in figure else "share")
        bench.add(f"unlearn: {name}: {figure}", [means[figure]], unit, classes=values)
    return means


def test_references(bench: Any, base: LipschitzMLP, classes: list[ClassData]) -> None:
    """The trained model, retraining without the class, gradient ascent."""
    _measure(bench, "base", base, classes, lambda data: base)
    _measure(bench, "retrained", base, classes, lambda data: _train([data.retain_train]))
    _measure(bench, "gradient ascent", base, classes, partial(_ascend, base))


@pytest.mark.parametrize("name", EDITS)
def test_edits(bench: Any, base: LipschitzMLP, classes: list[ClassData], name: str) -> None:
    """Every method over its strengths; the default has a budget."""
    means = _measure(bench, name, base, classes, lambda data: _edit(base, data, EDITS[name]))
    if name.startswith("default"):
        before = statistics.mean(accuracy(base, data.retain_held) for data in classes)
        lost, left = before - means["retain"], means["forget"]
        bench.add("unlearn: default: retained accuracy lost", [lost], "share", most=RETAIN_LOSS)
        bench.add("unlearn: default: forgotten accuracy left", [left], "share", most=FORGET_LEFT)
