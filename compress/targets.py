"""What can be removed: components as blocks of neighbouring inputs of a linear map.

A neuron is a block of one input of the down projection, a MaxMin pair a block of two, a group of
attention heads that shares keys and values a block of the output projection's inputs, a channel
the taps of a convolution that read it. Everything downstream (scores, allocation, compensation)
sees only blocks; RoPE pairs stay whole because heads do.
"""

# Legend: I inputs of the pruned map, O its outputs, U inputs per component.

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ShapeError

KINDS = ("mlp", "heads", "channels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One place of the model whose inputs can be removed.

    Attributes:
        name: Unique within the model: ``layers.0.mlp``, ``layers.0.heads``.
        layer: Layer index, for reports.
        kind: One of ``KINDS``.
        inputs: Inputs of the pruned linear map; im2col columns for a convolution.
        unit: Neighbouring inputs per component; they stay or go together.
        params: Parameters that disappear with one component, on average over the components.
        flops: Operations (2 per multiply-add) per token or image that disappear with it.
    """

    name: str
    layer: int
    kind: str
    inputs: int
    unit: int
    params: int
    flops: float

    @property
    def components(self) -> int:
        """Number of components."""
        return self.inputs // self.unit


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Rebuild ``y = x W`` from some of the components of ``x``, in the mean square over data.

    Attributes:
        gram_II: Mean of ``x' x`` over tokens (float64); the covariance when a bias may move.
        weight_IO: The map, one row per input (float64).
        unit: Inputs per component.
        ridge: Penalty on changes of the weights, relative to the mean diagonal of the Gram.
        mean_I: Mean of ``x`` over tokens (float64) where the Gram is not centred; scores that
            look at variances need it.
    """

    gram_II: Tensor
    weight_IO: Tensor
    unit: int = 1
    ridge: float = 1e-6
    mean_I: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the shapes belong together."""
        inputs = self.weight_IO.shape[0]
        if self.gram_II.shape != (inputs, inputs) or inputs % self.unit:
            raise ShapeError(
                f"Problem: gram {tuple(self.gram_II.shape)}, weight {tuple(self.weight_IO.shape)}, "
                f"unit {self.unit}: expected a square gram, one row per input, whole components"
            )

    @property
    def components(self) -> int:
        """Number of components."""
        return self.weight_IO.shape[0] // self.unit

    @property
    def penalty(self) -> float:
        """The ridge in units of the Gram."""
        return self.ridge * float(self.gram_II.diagonal().mean())

    @property
    def energy(self) -> float:
        """Mean square of the complete output, ``tr(W' G W)``."""
        return float((self.weight_IO * (self.gram_II @ self.weight_IO)).sum())


def block_indices(components: Tensor, unit: int) -> Tensor:
    """Return the input indices of components, keeping their order.

    Args:
        components: Component indices (int64, 1-D).
        unit: Inputs per component.

    Returns:
        Input indices (int64, ``unit`` per component).
    """
    offsets = torch.arange(unit, device=components.device)
    return (components[:, None] * unit + offsets).flatten()


def diagonal_blocks(matrix_II: Tensor, unit: int) -> Tensor:
    """Return the diagonal blocks of a square matrix, (I / unit, unit, unit)."""
    count = matrix_II.shape[0] // unit
    blocked = matrix_II.reshape(count, unit, count, unit)
    return blocked.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
