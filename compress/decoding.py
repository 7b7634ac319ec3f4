"""Decoding token by token with the keys and values of earlier tokens kept.

For sampling calibration text and for timing a decode step; serving has its own engine.
"""

# Legend: B sequences, T new tokens, S tokens so far, V vocabulary, H query heads, K kv heads,
# D head width.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ShapeError
from common.models import LipschitzTransformer


class KVCache:
    """Keys and values of one batch of sequences, for every layer of a transformer.

    Room for the whole context is taken when the first tokens arrive; all sequences are equally
    long.

    Args:
        model: The transformer; layers may differ in their heads.

    Attributes:
        length: Tokens so far.
    """

    def __init__(self, model: LipschitzTransformer):
        self.model = model
        self.length = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor) -> Tensor:
        """Append tokens (B, T) and return the logits (B, V) after the last one.

        Raises:
            ShapeError: when the sequences become longer than the model's context.
        """
        end = self.length + tokens_BT.shape[1]
        if end > self.model.config.context:
            raise ShapeError(
                f"sequence of {end} tokens: expected at most the model's context of "
                f"{self.model.config.context}; decode fewer tokens"
            )
        device = self.model.embedding.weight.device
        positions_1T = torch.arange(self.length, end, device=device)[None]
        x_BTC = self.model.embed(tokens_BT.to(device))
        x_BTC = self.model.stream(x_BTC, positions_1T, self._attend)
        self.length = end
        return self.model.logits(x_BTC[:, -1])

    def step(self, tokens_B1: Tensor) -> Tensor:
        """Append one token (B, 1) to every sequence and return the logits (B, V) after it."""
        return self.prefill(tokens_B1)

    def _attend(self, index: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        attention: Any = self.model.layers[index].attention
        if index not in self._kept:
            batch, heads, _, dim = k_BKTD.shape
            shape = (batch, heads, self.model.config.context, dim)
            self._kept[index] = k_BKTD.new_empty(shape), v_BKTD.new_empty(shape)
        end = self.length + k_BKTD.shape[2]
        for kept, new in zip(self._kept[index], (k_BKTD, v_BKTD), strict=True):
            kept[:, :, self.length : end] = new
        k_BKSD, v_BKSD = (kept[:, :, :end] for kept in self._kept[index])
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attn_mask=self._mask(attention.position_bias, q_BHTD),
            scale=attention.layer.logit_scale,
            enable_gqa=attention.layer.group > 1,
        )

    def _mask(self, bias_HS: Tensor | None, q_BHTD: Tensor) -> Tensor | None:
        """Return what is added to the logits (H or 1, T, S), or None where all are visible."""
        count = q_BHTD.shape[2]
        if count == 1 and bias_HS is None:
            return None
        end = self.length + count
        key_S = torch.arange(end, device=q_BHTD.device)
        distance_TS = key_S[self.length :, None] - key_S
        if bias_HS is None:
            mask_HTS = q_BHTD.new_zeros(1, *distance_TS.shape)
        else:
            mask_HTS = bias_HS.to(q_BHTD.dtype)[:, distance_TS.clamp(min=0)]
        return mask_HTS.masked_fill(distance_TS < 0, float("-inf"))
