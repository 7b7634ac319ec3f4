"""The Lipschitz MLP for images and other vectors."""

# Legend: B batch, I input features.

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from common.config import one_of, positive
from common.errors import ConfigError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "abs": torch.abs}


class LipschitzMLP(nn.Module):
    """Linear layers with an activation of slope at most 1 between them.

    Args:
        sizes: Widths from input to classes, at least two.
        activation: ``relu`` or ``abs``.
        bias: Whether the layers have biases.

    Raises:
        ConfigError: for fewer than two sizes or an unknown activation.

    Source:
        arXiv 2507.13338, CIFAR-10 experiments (3072-256-256-10, ReLU, no biases).
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", bias: bool = True):
        super().__init__()
        if len(sizes) < 2:
            raise ConfigError(f"sizes={list(sizes)}: expected input and output width")
        for size in sizes:
            positive("sizes", size)
        one_of("activation", activation, _ACTIVATIONS)
        self.sizes, self.activation, self.bias = tuple(sizes), activation, bias
        self.linears = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in pairwise(sizes)
        )

    def forward(self, x_BI: Tensor) -> Tensor:
        """Return class logits (B, classes) of flattened inputs (B, I)."""
        activation = _ACTIVATIONS[self.activation]
        for linear in self.linears[:-1]:
            x_BI = activation(linear(x_BI))
        return self.linears[-1](x_BI)
