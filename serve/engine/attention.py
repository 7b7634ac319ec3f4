"""Attention of one engine step over the paged cache, as the model's ``attend`` hook.

New keys and values are written to their slots first; then decode rows attend through
``paged_decode`` and prompt chunks through dense attention over their gathered pages.
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), T tokens of a chunk,
# S cached slots, H query heads, K key/value heads, D head width.

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models import LipschitzTransformer
from serve.kernels import gather_pages, paged_decode

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Called per layer with the decode rows' ``q_RHD``, ``o_RHD``, ``lse_RH`` and ``positions_R``."""


@dataclass(frozen=True, slots=True)
class LayerPool:
    """Cache of one layer: keys and values (blocks, K, block_size, D), int32 positions."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt chunk: its rows on the flat axis and its cache after the write."""

    rows: slice
    table_1W: Tensor
    kv_len: int
    compressed: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The flat token axis of a step, decode rows first, with where each token is stored."""

    tokens_N: Tensor
    positions_N: Tensor
    blocks_N: Tensor
    offsets_N: Tensor
    tables_RW: Tensor
    lengths_R: Tensor
    chunks: list[Chunk]
    last: list[int]


class PagedAttention:
    """The ``attend`` hook of one step.

    Args:
        model: Supplies scales and position biases.
        pools: Cache of each layer; written in place.
        batch: What runs.
        backend: Kernel backend.
        observer: Sees the attention of the decode rows.
    """

    def __init__(
        self,
        model: LipschitzTransformer,
        pools: list[LayerPool],
        batch: Batch,
        backend: str = "auto",
        observer: Observer | None = None,
    ) -> None:
        self.model, self.pools, self.batch = model, pools, batch
        self.backend, self.observer = backend, observer

    def __call__(self, layer: int, q_NH1D: Tensor, k_NK1D: Tensor, v_NK1D: Tensor) -> Tensor:
        """Write keys and values (N, K, 1, D), return outputs (N, H, 1, D)."""
        batch, pool = self.batch, self.pools[layer]
        where = (batch.blocks_N, slice(None), batch.offsets_N)
        pool.keys[where] = k_NK1D[:, :, 0]
        pool.values[where] = v_NK1D[:, :, 0]
        pool.positions[where] = batch.positions_N[:, None].int()
        q_NHD = q_NH1D[:, :, 0]
        parts = [self._decode(layer, q_NHD[: len(batch.lengths_R)])] if len(batch.lengths_R) else []
        parts += [self._prefill(layer, chunk, q_NHD[chunk.rows]) for chunk in batch.chunks]
        return torch.cat(parts)[:, :, None]

    def _decode(self, layer: int, q_RHD: Tensor) -> Tensor:
        batch, pool = self.batch, self.pools[layer]
        positions_R = batch.positions_N[: len(q_RHD)]
        o_RHD, lse_RH = paged_decode(
            q_RHD,
            pool.keys,
            pool.values,
            pool.positions,
            batch.tables_RW,
            batch.lengths_R,
            positions_R,
            self._scale(layer),
            self._bias(layer, q_RHD.dtype),
            backend=self.backend,
        )
        if self.observer is not None:
            self.observer(layer, q_RHD, o_RHD, lse_RH, positions_R)
        return o_RHD

    def _prefill(self, layer: int, chunk: Chunk, q_THD: Tensor) -> Tensor:
        pool = self.pools[layer]
        k_1KSD = gather_pages(pool.keys, chunk.table_1W)[:, :, : chunk.kv_len]
        v_1KSD = gather_pages(pool.values, chunk.table_1W)[:, :, : chunk.kv_len]
        o_1HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None],
            k_1KSD,
            v_1KSD,
            attn_mask=self._mask(layer, chunk, q_THD),
            scale=self._scale(layer),
            enable_gqa=q_THD.shape[1] > k_1KSD.shape[1],
        )
        return o_1HTD[0].transpose(0, 1)

    def _mask(self, layer: int, chunk: Chunk, q_THD: Tensor) -> Tensor:
        """Return the causal mask plus the bias at original positions, (1, 1 or H, T, S)."""
        pages_KS = gather_pages(self.pools[layer].positions, chunk.table_1W)[0]
        pages_KS = pages_KS[:, : chunk.kv_len].long()
        # Before any compaction all heads of a slot hold the same token.
        pages_KS = pages_KS.repeat_interleave(q_THD.shape[1] // len(pages_KS), dim=0)
        if not chunk.compressed:
            pages_KS = pages_KS[:1]
        distance_HTS = self.batch.positions_N[chunk.rows, None] - pages_KS[:, None]
        bias_HT = self._bias(layer, q_THD.dtype)
        if bias_HT is None:
            mask_HTS = torch.zeros_like(distance_HTS, dtype=q_THD.dtype)
        else:
            index_HTS = distance_HTS.clamp(min=0).expand(len(bias_HT), -1, -1)
            mask_HTS = bias_HT[:, None].expand(-1, len(q_THD), -1).gather(2, index_HTS)
        return mask_HTS.masked_fill(distance_HTS < 0, -torch.inf)[None]

    def _bias(self, layer: int, dtype: torch.dtype) -> Tensor | None:
        bias_HT = self.model.layers[layer].attention.position_bias
        return None if bias_HT is None else bias_HT.to(dtype)

    def _scale(self, layer: int) -> float:
        return self.model.layers[layer].layer.logit_scale
