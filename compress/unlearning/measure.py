"""What a model knows about each part of the data: losses, accuracy or bits per byte, probes.

Everything here is a measurement. Giving other answers about a class is not erasure: ``probe``
asks the last hidden layer whether the class can still be told from the others.
"""

# Legend: N samples, T tokens, V outputs (classes or vocabulary), I inputs of the last map.

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.adapters import Adapter, adapter_for, captured
from compress.statistics.collect import batches, run
from compress.targets import Target
from compress.unlearning.samples import ClassData, Samples, spread

PROBE_RIDGE = 1e-3
"""Of the linear probe, relative to the mean square of a hidden unit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answers:
    """What one model makes of some samples.

    Attributes:
        losses_N: Cross-entropy of every sample, nats, the mean over its tokens; on the CPU.
        right_N: Share of right answers (float64): of text over the tokens, of an image 0 or 1.
        bytes_per_token: Of the text; None for images.
    """

    losses_N: Tensor
    right_N: Tensor
    bytes_per_token: float | None

    @property
    def knowledge(self) -> float:
        """Accuracy of images, minus the bits per byte of text: larger is more."""
        if self.bytes_per_token is None:
            return float(self.right_N.mean())
        return -float(self.losses_N.mean()) / math.log(2) / self.bytes_per_token

    def first(self, count: int) -> "Answers":
        """Return the answers on what ``Samples.first`` returns."""
        index = spread(len(self.losses_N), count)
        return dataclasses.replace(self, losses_N=self.losses_N[index], right_N=self.right_N[index])


class Examined:
    """One model on every part of the data; each part is run once, when it is first asked for.

    Args:
        model: The model.
        data: The class and the rest.
    """

    def __init__(self, model: Any, data: ClassData):
        self.model, self.data = model, data
        self._found: dict[str, Answers] = {}

    def on(self, part: str) -> Answers:
        """Return the answers on a part: ``forget_train`` and so on."""
        if part not in self._found:
            self._found[part] = answers(self.model, self.data.parts()[part])
        return self._found[part]

    def figures(self) -> dict[str, float]:
        """Return accuracy or bits per byte of every part, by names such as ``forget_acc_held``."""
        kind, sign = ("bits_per_byte", -1) if self.data.is_text else ("acc", 1)
        found = {}
        for name in self.data.parts():
            part, _, split = name.partition("_")
            found[f"{part}_{kind}_{split}"] = sign * self.on(name).knowledge
        return found


@torch.no_grad()
def answers(model: Any, samples: Samples) -> Answers:
    """Run a model on samples."""
    device = next(model.parameters()).device
    losses, right = [], []
    for part, target in zip(batches(samples.inputs), _alike(samples), strict=True):
        logits, target = model(part.to(device)), target.to(device)
        losses.append(sample_losses(logits, target).cpu())
        is_right = (logits.argmax(-1) == target).cpu()
        right.append(is_right.view(len(target), -1).double().mean(1))
    return Answers(
        losses_N=torch.cat(losses),
        right_N=torch.cat(right),
        bytes_per_token=samples.bytes_per_token,
    )


def losses(model: Any, samples: Samples) -> Tensor:
    """Return the cross-entropy of every sample (N), see ``Answers``."""
    return answers(model, samples).losses_N


def accuracy(model: Any, samples: Samples) -> float:
    """Return the share of images whose largest logit is that of their class."""
    return float(answers(model, samples).right_N.mean())


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of every sample (N) from logits (N, V) or (N, T, V)."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return flat.view(len(targets), -1).mean(1)


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
