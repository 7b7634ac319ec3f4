"""Causal attention of whole windows without a cache, as a decoder's ``attend`` hook."""

# Legend: B windows, T tokens of a window, N = B * T tokens (flat), C queries of a chunk, S keys,
# H query heads, K key/value heads, D head width.

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec

CHUNK = 512  # queries whose mask is held at a time, where a layer needs one


class CausalAttention:
    """The ``attend`` hook of windows of equal length, laid out one after another.

    Args:
        specs: Attention of each layer.
        windows: How many windows the flat axis holds (B).
    """

    def __init__(self, specs: Sequence[LayerSpec], windows: int) -> None:
        self.specs, self.windows = specs, windows

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Return outputs (N, H, D)."""
        spec = self.specs[layer]
        q_BHTD, k_BKTD, v_BKTD = (
            x.unflatten(0, (self.windows, -1)).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD)
        )
        length = q_BHTD.shape[2]
        attend = functools.partial(
            F.scaled_dot_product_attention, scale=spec.scale, enable_gqa=spec.group > 1
        )
        if spec.bias_HT is None and (spec.sliding_window or length) >= length:
            o_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, is_causal=True)
            return o_BHTD.transpose(1, 2).flatten(0, 1)
        chunks = []
        for first in range(0, length, CHUNK):
            last = min(first + CHUNK, length)
            mask_HCS = self._mask(spec, first, last, q_NHD)
            q_BHCD, keys = q_BHTD[:, :, first:last], (k_BKTD[:, :, :last], v_BKTD[:, :, :last])
            chunks.append(attend(q_BHCD, *keys, attn_mask=mask_HCS))
        return torch.cat(chunks, dim=2).transpose(1, 2).flatten(0, 1)

    def _mask(self, spec: LayerSpec, first: int, last: int, like: Tensor) -> Tensor:
        """Return what is added to the logits of queries ``first`` to ``last``, (1 or H, C, S)."""
        query_C = torch.arange(first, last, device=like.device)
        distance_CS = query_C[:, None] - torch.arange(last, device=like.device)
        mask_HCS = torch.zeros_like(distance_CS, dtype=like.dtype)[None]
        if spec.bias_HT is not None:
            mask_HCS = spec.bias_HT.to(like.dtype)[:, distance_CS.clamp(min=0)]
        is_hidden_CS = distance_CS < 0
        if spec.sliding_window is not None:
            is_hidden_CS = is_hidden_CS | (distance_CS >= spec.sliding_window)
        return mask_HCS.masked_fill(is_hidden_CS, -torch.inf)
