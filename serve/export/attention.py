"""Attention of one forward pass of the exported model, as our model's ``attend`` hook.

The arithmetic is that of ``transformers``: its cache objects, its masks and whichever attention
function was chosen there. A relative-position bias goes into the additive mask of its layer.
"""

# Legend: B batch, T query token, S cache slot, H query heads, K key/value heads, D head width,
# C model width.

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.models import LipschitzTransformer
from common.models.layers import Attention, TurningAttend
from common.models.rope import rotate, rotation

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of ``transformers``: ``(module, q, k, v, mask, ...) -> (o_BTHD, p)``."""


def prepare_attention(model: LipschitzTransformer) -> None:
    """Give a model's attention modules the attributes that attention functions read."""
    for layer in model.layers:
        attention: Any = layer.attention
        attention.layer_idx = attention.index
        attention.num_key_value_groups = attention.layer.group
        attention.is_causal = True


def slot_distance(queries: int, slots: int, past: int | Tensor, device: torch.device) -> Tensor:
    """Return how many slots each key lies before each query (T, S), negative for later ones.

    Args:
        queries: Tokens of this pass, T.
        slots: Keys that the attention function will see, S.
        past: Slots that were filled before this pass; a tensor for a static cache.
        device: Where.
    """
    query_T = torch.arange(queries, device=device) + past
    return query_T[:, None] - torch.arange(slots, device=device)


def biased_mask(bias_HT: Tensor, distance_TS: Tensor, mask: Tensor | None) -> Tensor:
    """Return the additive mask of a layer with a relative-position bias.

    Args:
        bias_HT: Bias of each head by distance, in the dtype of the queries.
        distance_TS: As of ``slot_distance``.
        mask: What ``transformers`` made: boolean, additive, or None for plain causality.

    Returns:
        Tensor (B or 1, H, T, S); what is masked holds the dtype's lowest finite number, because
        rows of padding are masked throughout.
    """
    index_TS = distance_TS.clamp(0, bias_HT.shape[1] - 1)
    bias_1HTS = bias_HT[:, index_TS][None]
    lowest = torch.finfo(bias_HT.dtype).min
    if mask is None:
        return bias_1HTS.masked_fill(distance_TS < 0, lowest)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias_1HTS, lowest)
    return (bias_1HTS + mask).clamp(min=lowest)


class CachedAttention(TurningAttend):
    """Attention of one forward pass, given to the model as its ``attend`` hook.

    All layers share its rotations.

    Args:
        model: Prepared by ``prepare_attention``.
        function: Attention function.
        cache: Cache of ``transformers``, updated in place, or None.
        mask: Mask shared by all layers, or None for plain causality.
        positions_BT: Position of each token (B or 1, T).
        distance_TS: As of ``slot_distance``; None where no layer has a bias.
        options: Keyword arguments that the attention function gets as they are.
    """

    def __init__(
        self,
        model: LipschitzTransformer,
        function: AttentionFunction,
        cache: Any,
        mask: Tensor | None,
        positions_BT: Tensor,
        distance_TS: Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        self.attentions: list[Any] = [layer.attention for layer in model.layers]
        self.function, self.cache, self.options = function, cache, options
        self.mask, self.positions_BT, self.distance_TS = mask, positions_BT, distance_TS
        self.rotations: dict[int, Tensor] = {}
        self.weights: list[Tensor | None] = []

    def _rotation(self, attention: Attention, dtype: torch.dtype) -> Tensor:
        """Return the rotation of this pass for the head width of a layer, computed once."""
        width = attention.layer.head_dim
        if width not in self.rotations:
            # Copied to the device once, not in every pass.
            attention.inverse_frequency = attention.inverse_frequency.to(self.positions_BT.device)
            self.rotations[width] = rotation(self.positions_BT, attention.inverse_frequency, dtype)
        return self.rotations[width]

    def turning(self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Rotate, append keys and values to the cache, return outputs (B, H, T, D)."""
        attention = self.attentions[layer]
        if attention.query is not None:
            cos_sin = self._rotation(attention, q_BHTD.dtype)
            q_BHTD, k_BKTD = rotate(q_BHTD, cos_sin), rotate(k_BKTD, cos_sin)
        return self(layer, q_BHTD, k_BKTD, v_BKTD)

    def __call__(self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Append keys and values to the cache, return outputs (B, H, T, D)."""
        attention = self.attentions[layer]
        k_BKSD, v_BKSD = k_BKTD, v_BKTD
        if self.cache is not None:
            k_BKSD, v_BKSD = self.cache.update(k_BKTD, v_BKTD, layer)
        scale = attention.layer.logit_scale
        if scale == 0:
            # Torch scales its own causal mask as well: minus infinity times 0.
            q_BHTD, scale = torch.zeros_like(q_BHTD), 1.0
        mask = self.mask
        if attention.position_bias is not None and self.distance_TS is not None:
            mask = biased_mask(attention.position_bias.to(q_BHTD.dtype), self.distance_TS, mask)
        o_BTHD, weights = self.function(
            attention, q_BHTD, k_BKSD, v_BKSD, mask, dropout=0.0, scaling=scale, **self.options
        )
        self.weights.append(weights)
        return o_BTHD.transpose(1, 2)
