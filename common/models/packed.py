"""The transformer's inference form: the same weights and function in far fewer operations.

Tokens of any sequences lie on one flat axis and attention is the caller's. Queries, keys and values
come from one matrix, the product that ends a residual block also scales and adds, and angles are
looked up. Equal to ``LipschitzTransformer`` up to rounding; never trained.
"""

# Legend: N tokens (flat), M of them with logits, H query heads, K key/value heads, D head width,
# C width, O output features, V vocabulary.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.config import DIVIDED
from common.models.layers import Layer, TurningAttend, undivided
from common.models.rope import turn, turn_table
from common.models.transformer import LipschitzTransformer

FlatAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Hook ``attend(layer, q_NHD, k_NKD, v_NKD) -> o_NHD``; queries and keys are rotated."""

Turns = tuple[Tensor, Tensor]
"""Cosines and sines (N, 1, D) as ``rope.turn`` takes them."""


class PackedTransformer:
    """A model prepared for decoding.

    Its weights keep their values but move: query, key and value matrices become views of one
    stack, and on the CPU float32 matrices of more rows than columns are stored column by column.

    Args:
        model: In evaluation mode on its device. Later changes of its weights in place are seen.
    """

    def __init__(self, model: LipschitzTransformer) -> None:
        self.model = model
        with torch.inference_mode(False), torch.no_grad():
            store(model.head)
            layers: Any = model.layers
            self.layers = [PackedLayer(layer) for layer in layers]
        self._tables = {layer.head_dim: layer.turn_table(model) for layer in self.layers}

    def __call__(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: FlatAttend | TurningAttend,
        last_M: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (M, V) after the tokens ``last_M``, or (N, V) after all.

        Args:
            tokens_N: Token ids, int64.
            positions_N: Original positions, below the context.
            attend: The attention of every layer; a ``TurningAttend`` gets to rotate as well.
            last_M: Indices of tokens; None for all.
        """
        x_NC = self.model.embed(tokens_N)
        turns: dict[int, Turns] = {}
        if isinstance(attend, TurningAttend):
            attend = attend.turning
        else:
            turns = {dim: _rows(table, positions_N) for dim, table in self._tables.items()}
        for layer in self.layers:
            x_NC = layer(x_NC, turns.get(layer.head_dim), attend)
        return self.model.logits(x_NC if last_M is None else x_NC.index_select(0, last_M))


class PackedLayer:
    """A layer of the transformer on a flat token axis; see ``Layer`` for the arithmetic."""

    def __init__(self, layer: Layer) -> None:
        self.attention, self.config = layer.attention, layer.layer
        self.head_dim = self.config.head_dim
        self.qkv_OC: Tensor | None = None
        if self.config.content_heads == self.config.heads:
            attention: Any = self.attention
            self.qkv_OC = stacked([attention.query, attention.key, attention.value])
        store(layer.mlp.up)
        a, b = self.config.attn_residual, self.config.mlp_residual
        divisor = self.config.gelu_divisor if self.config.activation in DIVIDED else 1.0
        self.output = _Blend(self.attention.output, a, a * self.config.attn_factor)
        self.up, self.up_bias = layer.mlp.up.weight.data, layer.mlp.up.bias
        self.down = _Blend(layer.mlp.down, b, b, divisor)

    def turn_table(self, model: LipschitzTransformer) -> Tensor:
        """Return the rotations of all positions, as ``rope.turn_table``."""
        weight = model.embedding.weight
        frequency = self.attention.inverse_frequency
        return turn_table(model.config.context, frequency, weight.dtype).to(weight.device)

    def __call__(self, x_NC: Tensor, turns: Turns | None, attend: FlatAttend) -> Tensor:
        """Return the stream (N, C) after both blocks; ``attend`` rotates if ``turns`` is None."""
        o_NHD = attend(self.attention.index, *self._project(x_NC, turns))
        x_NC = self.output(x_NC, o_NHD.flatten(1))
        z_NF = F.linear(x_NC, self.up, self.up_bias)
        return self.down(x_NC, undivided(z_NF, self.config.activation))

    def _project(self, x_NC: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, rotated if ``turns`` are given."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        if self.qkv_OC is None:
            # Positional heads: the layer knows which ones have neither queries nor keys.
            q_NHD, k_NKD, v_NKD = (x[:, :, 0] for x in self.attention.project(x_NC[:, None]))
            if turns is not None and self.config.content_heads:
                q_NHD, k_NKD = turn(q_NHD, *turns), turn(k_NKD, *turns)
            return q_NHD, k_NKD, v_NKD
        qkv_NAD = F.linear(x_NC, self.qkv_OC).view(-1, heads + 2 * kv_heads, self.head_dim)
        qk_NAD, v_NKD = qkv_NAD.split((heads + kv_heads, kv_heads), dim=1)
        if turns is not None:
            qk_NAD = turn(qk_NAD, *turns)
        q_NHD, k_NKD = qk_NAD.split((heads, kv_heads), dim=1)
        return q_NHD, k_NKD, v_NKD


def _rows(table_T2D: Tensor, positions_N: Tensor) -> Turns:
    cos_ND, sin_ND = table_T2D.index_select(0, positions_N).unbind(1)
    return cos_ND[:, None], sin_ND[:, None]


class _Blend:
    """End of a residual block: ``(1 - a) x + factor W (y / divisor) + factor bias``."""

    def __init__(self, linear: nn.Linear, a: float, factor: float, divisor: float = 1.0) -> None:
        self.w_IO, self.bias_O = linear.weight.data.t(), linear.bias
        self.rest, self.factor, self.scale = 1 - a, factor, factor / divisor

    def __call__(self, x_NO: Tensor, y_NI: Tensor) -> Tensor:
        x_NO = torch.addmm(x_NO, y_NI, self.w_IO, beta=self.rest, alpha=self.scale)
        return x_NO if self.bias_O is None else x_NO.add_(self.bias_O, alpha=self.factor)


def store(linear: nn.Linear) -> None:
    """Store a matrix the way products with few tokens read it fastest; values are unchanged."""
    weight = linear.weight
    if not _reads_columns(weight):
        weight.data = weight.data.contiguous()
    elif weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()


def stacked(linears: list[nn.Linear]) -> Tensor:
    """Return the matrices one below the other (O, C); their weights become views of the result."""
    weights = [linear.weight for linear in linears]
    sizes = [len(weight) for weight in weights]
    whole_OC = _neighbours(weights)
    if whole_OC is None:
        whole_OC = torch.cat([weight.data for weight in weights])
        if _reads_columns(whole_OC):
            whole_OC = whole_OC.t().contiguous().t()
        for weight, part_OC in zip(weights, whole_OC.split(sizes), strict=True):
            weight.data = part_OC
    return whole_OC


def _neighbours(weights: list[Tensor]) -> Tensor | None:
    """Return the matrix that the weights already are views of, row range after row range."""
    first, end = weights[0].data, weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or weight.stride() != first.stride() or weight.data_ptr() != end:
            return None
        end += len(weight) * first.stride(0) * first.element_size()
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _reads_columns(weight_OC: Tensor) -> bool:
    # In float32 a product with few tokens is 1.3 times as fast when it runs along memory in the
    # longer direction; other dtypes have routines for rows alone.
    is_single = weight_OC.device.type == "cpu" and weight_OC.dtype == torch.float32
    return is_single and weight_OC.shape[0] > weight_OC.shape[1]
