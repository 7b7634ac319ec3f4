"""The Lipschitz MLP for images and other vectors."""

# Legend: B batch, I input features, F hidden width.

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.config import check_types, one_of, positive
from common.errors import ConfigError

MLP_ACTIVATIONS = ("relu", "tanh", "abs", "maxmin")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MLPConfig:
    """Shape of a ``LipschitzMLP``; input and number of classes come from the data.

    Attributes:
        hidden: Hidden widths, even for ``maxmin``; none is a linear classifier.
        activation: ``relu``, ``tanh``, ``abs`` or ``maxmin``.
        bias: Whether the layers have biases (they cost nothing in the certificate).
    """

    hidden: tuple[int, ...] = (256, 256)
    activation: str = "relu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for width in self.hidden:
            positive("model.hidden", width)
        check_sizes((2, *self.hidden, 2), self.activation)

    def build(self, inputs: int, classes: int) -> "LipschitzMLP":
        """Return the untrained model."""
        return LipschitzMLP((inputs, *self.hidden, classes), self.activation, self.bias)


def check_sizes(sizes: Sequence[int], activation: str) -> None:
    """Raise ``ConfigError`` unless there is an MLP with these widths and this activation."""
    if len(sizes) < 2:
        raise ConfigError(f"sizes={list(sizes)}: expected input and output width")
    for size in sizes:
        positive("sizes", size)
    one_of("activation", activation, MLP_ACTIVATIONS)
    if activation == "maxmin" and any(size % 2 for size in sizes[1:-1]):
        raise ConfigError(
            f"hidden widths {list(sizes[1:-1])}: expected even numbers, maxmin sorts pairs"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """Everything needed to build a ``LipschitzMLP``; see there."""

    sizes: tuple[int, ...]
    activation: str = "relu"
    bias: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(self.sizes, self.activation)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {"sizes": list(self.sizes), "activation": self.activation, "bias": self.bias}


class LipschitzMLP(nn.Module):
    """Linear layers with an activation of slope at most 1 between them.

    Args:
        sizes: Widths from input to classes, at least two; or a whole ``ClassifierConfig``.
        activation: ``relu``, ``tanh``, ``abs`` or ``maxmin`` (sorts neighbouring pairs).
        bias: Whether the layers have biases.

    Raises:
        ConfigError: for fewer than two sizes, an unknown activation, odd widths with maxmin.

    Source:
        arXiv 2507.13338, CIFAR-10 experiments (3072-256-256-10, ReLU, no biases).
    """

    def __init__(
        self,
        sizes: Sequence[int] | ClassifierConfig,
        activation: str = "relu",
        bias: bool = True,
    ):
        super().__init__()
        if not isinstance(sizes, ClassifierConfig):
            sizes = ClassifierConfig(sizes=tuple(sizes), activation=activation, bias=bias)
        self.config = sizes
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=self.config.bias)
            for fan_in, fan_out in pairwise(self.config.sizes)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths from input to classes."""
        return self.config.sizes

    @property
    def activation(self) -> str:
        """Name of the activation."""
        return self.config.activation

    @property
    def bias(self) -> bool:
        """Whether the layers have biases."""
        return self.config.bias

    @property
    def num_parameters(self) -> int:
        """Number of weights and biases."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return class logits (B, classes) of flattened inputs (B, I)."""
        for linear in self.linears[:-1]:
            x_BI = self.activate(linear(x_BI))
        return self.linears[-1](x_BI)

    def activate(self, z_BF: Tensor) -> Tensor:
        """Apply the activation to pre-activations (B, F)."""
        if self.activation == "relu":
            return torch.relu(z_BF)
        if self.activation == "tanh":
            return z_BF.tanh()
        if self.activation == "abs":
            return z_BF.abs()
        pairs = z_BF.unflatten(-1, (-1, 2))
        return torch.stack((pairs.amax(-1), pairs.amin(-1)), dim=-1).flatten(-2)
