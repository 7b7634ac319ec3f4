"""Trusted: attention and MLP blocks around computed tokens, behind one interface.

``Around`` is a block at computed tokens; its ``known(reach)`` is what can be said while the tokens
stay within reach: how far outputs move, and how functionals of the outputs go back to the inputs.
"""

# Legend: T token, C width, M functionals, I last tokens of a prefix, K kinds of size (0 per unit
# of perturbation, 1 rounding).

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from common.models import ModelConfig
from solvers.bounds.local.attention import (
    attention_rows,
    attention_sizes,
    attention_spread,
)
from solvers.bounds.local.attention_centre import attention_centre, attention_map
from solvers.bounds.local.mlp import (
    Slopes,
    mlp_centre,
    mlp_constants,
    mlp_map,
    mlp_rows,
    mlp_slopes,
)


class Known(Protocol):
    """A block while its tokens stay within reach."""

    def sizes(self, size_KT: Tensor, constant: float, value_path: float) -> Tensor:
        """Bound how far outputs (K, T) move when inputs move by ``size_KT``, without rounding.

        ``constant`` and ``value_path`` are certified for the whole block.
        """

    def rows(self, rows_MIC: Tensor, size_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Take functionals of the last I of T outputs back to the inputs.

        Returns functionals of inputs (of the same I tokens or all T) and a bound (K, M) on what is
        missing when inputs move by ``size_KT``.
        """


class Around(Protocol):
    """A block at computed tokens: its outputs (T, C) and their l2 rounding errors (T,)."""

    out_TC: Tensor
    fresh_T: Tensor

    def known(self, reach_T: Tensor, *, centred: bool) -> Known:
        """Return what holds while token t stays within ``reach_T``.

        ``centred``: only for movements away from the computed tokens.
        """


class MlpAround:
    """An MLP block at computed tokens; ``lambda_N`` are multipliers of its local K-form."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        index: int,
        x_TC: Tensor,
        lambda_N: Tensor | None = None,
    ) -> None:
        self.map = mlp_map(tensors, config.layer(index // 2))
        self.centre = mlp_centre(self.map, x_TC)
        self.lambda_N = lambda_N
        self.out_TC, self.fresh_T = self.centre.out_TC, self.centre.fresh_T

    def known(self, reach_T: Tensor, *, centred: bool) -> "MlpKnown":
        """Return the block with the slopes of every neuron within reach."""
        return MlpKnown(self, mlp_slopes(self.map, self.centre, reach_T, centred=centred))


class MlpKnown:
    """An MLP block with the slopes of every neuron around every token."""

    def __init__(self, around: MlpAround, slopes: Slopes) -> None:
        self.around, self.slopes = around, slopes

    def sizes(self, size_KT: Tensor, constant: float, value_path: float) -> Tensor:
        """Bound how far outputs move; see ``Known``."""
        if self.around.lambda_N is None:
            return constant * size_KT
        return size_KT * mlp_constants(self.around.map, self.slopes, self.around.lambda_N, constant)

    def rows(self, rows_MIC: Tensor, size_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Take functionals back; see ``Known``."""
        stop = size_KT.shape[1]
        first = stop - rows_MIC.shape[1]
        slopes = Slopes(*(part[first:stop] for part in self.slopes))
        back_MIC, missing_MI = mlp_rows(self.around.map, slopes, rows_MIC)
        return back_MIC, size_KT[:, first:] @ missing_MI.T


class AttentionAround:
    """An attention block at computed tokens."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Tensor], index: int, x_TC: Tensor
    ) -> None:
        self.map = attention_map(tensors, config.layer(index // 2), config)
        self.centre = attention_centre(self.map, x_TC)
        self.out_TC, self.fresh_T = self.centre.out_TC, self.centre.fresh_T

    def known(self, reach_T: Tensor, *, centred: bool) -> "AttentionKnown":
        """Return the block with bounds on its probabilities; ``centred`` changes nothing."""
        return AttentionKnown(self, reach_T)


class AttentionKnown:
    """An attention block with bounds on its probabilities, queries, keys and values."""

    def __init__(self, around: AttentionAround, reach_T: Tensor) -> None:
        self.around = around
        self.spread = attention_spread(around.map, around.centre, reach_T)

    def sizes(self, size_KT: Tensor, constant: float, value_path: float) -> Tensor:
        """Bound how far outputs move; see ``Known``."""
        around = self.around
        moved_KT = attention_sizes(around.map, around.centre, self.spread, size_KT, value_path)
        return torch.minimum(moved_KT, constant * size_KT.cummax(dim=1).values)

    def rows(self, rows_MIC: Tensor, size_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Take functionals back; see ``Known``."""
        around = self.around
        return attention_rows(around.map, around.centre, self.spread, rows_MIC, size_KT)


def around(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    index: int,
    x_TC: Tensor,
    lambda_N: Tensor | None = None,
) -> MlpAround | AttentionAround | None:
    """Return block ``index`` at computed tokens (T, C); None where its residual weight is 0."""
    layer, kind = config.layer(index // 2), ("attention", "mlp")[index % 2]
    prefix = f"layers.{index // 2}.{kind}."
    local = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    if index % 2:
        mlp = MlpAround(config, local, index, x_TC, lambda_N) if layer.mlp_residual else None
        return mlp
    return AttentionAround(config, local, index, x_TC) if layer.attn_residual else None
