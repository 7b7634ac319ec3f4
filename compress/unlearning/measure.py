"""What a model knows about each part of the data: losses, accuracy or bits per byte, probes.

Everything here is a measurement. Giving other answers about a class is not erasure: ``probe``
asks the last hidden layer whether the class can still be told from the others.
"""

# Legend: N samples, T tokens, V outputs (classes or vocabulary), I inputs of the last map.

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.adapters import Adapter, adapter_for, captured
from compress.statistics.collect import batches, run
from compress.targets import Target
from compress.unlearning.samples import ClassData, Samples

PROBE_RIDGE = 1e-3
"""Of the linear probe, relative to the mean square of a hidden unit."""


@torch.no_grad()
def losses(model: Any, samples: Samples) -> Tensor:
    """Return the cross-entropy of every sample (N), nats, the mean over its tokens; on the CPU."""
    device = next(model.parameters()).device
    found = []
    for part, target in zip(batches(samples.inputs), _alike(samples), strict=True):
        found.append(sample_losses(model(part.to(device)), target.to(device)).cpu())
    return torch.cat(found)


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of every sample (N) from logits (N, V) or (N, T, V)."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return flat.view(len(targets), -1).mean(1)


@torch.no_grad()
def accuracy(model: Any, samples: Samples) -> float:
    """Return the share of images whose largest logit is that of their class."""
    device = next(model.parameters()).device
    right = 0
    for part, target in zip(batches(samples.inputs), _alike(samples), strict=True):
        right += int((model(part.to(device)).argmax(-1).cpu() == target).sum())
    return right / len(samples)


def knowledge(model: Any, samples: Samples) -> float:
    """Return accuracy of images, minus the bits per byte of text: larger is more."""
    if samples.bytes_per_token is None:
        return accuracy(model, samples)
    return -float(losses(model, samples).mean()) / math.log(2) / samples.bytes_per_token


def figures(model: Any, data: ClassData) -> dict[str, float]:
    """Return accuracy or bits per byte of every part, by names such as ``forget_acc_held``."""
    kind, sign = ("bits_per_byte", -1) if data.is_text else ("acc", 1)
    found = {}
    for name, samples in data.parts().items():
        part, _, split = name.partition("_")
        found[f"{part}_{kind}_{split}"] = sign * knowledge(model, samples)
    return found


@torch.no_grad()
def probe(model: Any, data: ClassData) -> float:
    """Return how well a linear probe of the last hidden layer still finds the class.

    The probe is ridge regression on all training images with their labels; the figure is the share
    of the class's held-out images that it gets right.

    Args:
        model: A classifier that ``adapter_for`` knows.
        data: Images.
    """
    adapter = adapter_for(model)
    last = adapter.targets()[-1]
    parts = (data.forget_train, data.retain_train)
    hidden_NI = torch.cat([_hidden(adapter, last, part) for part in parts])
    labels_N = torch.cat([part.targets for part in parts])
    wanted_NV = F.one_hot(labels_N).double()
    gram_II = hidden_NI.T @ hidden_NI
    gram_II.diagonal().add_(PROBE_RIDGE * float(gram_II.diagonal().mean()))
    map_IV = torch.linalg.solve(gram_II, hidden_NI.T @ wanted_NV)
    held_NI = _hidden(adapter, last, data.forget_held)
    return float(((held_NI @ map_IV).argmax(-1) == data.forget_held.targets).double().mean())


def _hidden(adapter: Adapter, target: Target, samples: Samples) -> Tensor:
    """Return what enters a map (N, I), and a constant 1 for the offset (float64, CPU)."""
    found: list[Tensor] = []
    with captured(adapter, [target], lambda _, rows: found.append(rows.double().cpu())):
        for batch in batches(samples.inputs):
            run(adapter, batch)
    hidden_NI = torch.cat(found)
    return torch.cat([hidden_NI, torch.ones(len(hidden_NI), 1, dtype=torch.float64)], dim=1)


def _alike(samples: Samples) -> tuple[Tensor, ...]:
    """Return the targets in batches of the same sizes as those of the inputs."""
    return samples.targets.split([len(part) for part in batches(samples.inputs)])
