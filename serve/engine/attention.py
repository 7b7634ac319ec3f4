"""Attention of one engine step over the paged cache, as a decoder's ``attend`` hook.

New keys and values are written to their slots first; then decode rows attend through
``paged_decode`` and prompt chunks through dense attention over their gathered pages.
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), T tokens of a chunk,
# S cached slots, H query heads, K key/value heads, D head width.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.pools import LayerPool
from serve.kernels import gather_pages, paged_decode


@dataclass(frozen=True, slots=True)
class Chunk:
    """A prompt chunk: its rows on the flat axis and its cache after the write."""

    rows: slice
    table_1W: Tensor
    kv_len: int
    compressed: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The flat token axis of a step, decode rows first, with where each token is stored.

    ``order`` maps decode rows, then chunks, to the items of the step.
    """

    tokens_N: Tensor
    positions_N: Tensor
    blocks_N: Tensor
    offsets_N: Tensor
    tables_RW: Tensor
    lengths_R: Tensor
    chunks: list[Chunk]
    last: list[int]


@dataclass(frozen=True, slots=True)
class Part:
    """Some queries of a layer with their attention: all decode rows, or one prompt chunk.

    Attributes:
        layer: Layer index.
        chunk: Index of the chunk; None for the decode rows.
        q_NHD: Queries after RoPE: one per decode row, or those of the chunk.
        o_NHD: Attention outputs over the cache.
        lse_NH: Log-sum-exp of the logits; None for a chunk over a full cache.
        positions_N: Original positions of the queries.
        tables_RW: Block tables: one per decode row, or the chunk's alone.
        lengths_R: Filled slots of these.
        pool: The layer's cache.
    """

    layer: int
    chunk: int | None
    q_NHD: Tensor
    o_NHD: Tensor
    lse_NH: Tensor | None
    positions_N: Tensor
    tables_RW: Tensor
    lengths_R: Tensor
    pool: LayerPool


class Listener(ABC):
    """Sees every attention of a step, and may correct its outputs."""

    @abstractmethod
    def attended(self, part: Part) -> Tensor:
        """Return the outputs to use (N, H, D), most often those of the part."""


class PagedAttention:
    """The ``attend`` hook of one step.

    Args:
        specs: Attention of each layer.
        pools: Cache of each layer; written in place.
        batch: What runs.
        backend: Kernel backend.
        listener: Sees, and may correct, the attention of every layer.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        pools: Sequence[LayerPool],
        batch: Batch,
        backend: str = "auto",
        listener: Listener | None = None,
    ) -> None:
        self.specs, self.pools, self.batch = specs, pools, batch
        self.backend, self.listener = backend, listener

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Write keys and values (N, K, D), return outputs (N, H, D)."""
        batch, pool = self.batch, self.pools[layer]
        where = (batch.blocks_N, slice(None), batch.offsets_N)
        pool.keys[where] = k_NKD
        pool.values[where] = v_NKD
        pool.positions[where] = batch.positions_N[:, None].int()
        parts = [self._decode(layer, q_NHD[: len(batch.lengths_R)])] if len(batch.lengths_R) else []
        parts += [
            self._prefill(layer, index, q_NHD[chunk.rows])
            for index, chunk in enumerate(batch.chunks)
        ]
        outputs = [part.o_NHD for part in parts]
        if self.listener is not None:
            outputs = [self.listener.attended(part) for part in parts]
        return torch.cat(outputs)

    def _decode(self, layer: int, q_RHD: Tensor) -> Part:
        batch, pool, spec = self.batch, self.pools[layer], self.specs[layer]
        positions_R = batch.positions_N[: len(q_RHD)]
        o_RHD, lse_RH = paged_decode(
            q_RHD,
            *pool.tensors,
            batch.tables_RW,
            batch.lengths_R,
            positions_R,
            spec.scale,
            _bias(spec, q_RHD.dtype),
            window=spec.sliding_window,
            backend=self.backend,
        )
        where = (batch.tables_RW, batch.lengths_R, pool)
        return Part(layer, None, q_RHD, o_RHD, lse_RH, positions_R, *where)

    def _prefill(self, layer: int, index: int, q_THD: Tensor) -> Part:
        chunk, pool, spec = self.batch.chunks[index], self.pools[layer], self.specs[layer]
        k_KSD, v_KSD = (
            gather_pages(x, chunk.table_1W)[0, :, : chunk.kv_len] for x in (pool.keys, pool.values)
        )
        mask_HTS = self._mask(layer, chunk, q_THD)
        if chunk.compressed:
            o_THD, lse_TH = attend_densely(q_THD, k_KSD, v_KSD, mask_HTS, spec.scale)
        else:
            o_THD, lse_TH = _attend_fast(q_THD, k_KSD, v_KSD, mask_HTS, spec.scale), None
        positions_T = self.batch.positions_N[chunk.rows]
        lengths_1 = torch.tensor([chunk.kv_len], device=q_THD.device)
        where = (positions_T, chunk.table_1W, lengths_1, pool)
        return Part(layer, index, q_THD, o_THD, lse_TH, *where)

    def _mask(self, layer: int, chunk: Chunk, q_THD: Tensor) -> Tensor:
        """Return the causal mask plus the bias at original positions, (1 or H, T, S)."""
        spec = self.specs[layer]
        pages_KS = gather_pages(self.pools[layer].positions, chunk.table_1W)[0]
        pages_KS = pages_KS[:, : chunk.kv_len].long()
        # Before any compaction all heads of a slot hold the same token.
        if chunk.compressed:
            pages_HS = pages_KS.repeat_interleave(spec.group, dim=0)
        else:
            pages_HS = pages_KS[:1]
        distance_HTS = self.batch.positions_N[chunk.rows, None] - pages_HS[:, None]
        bias_HT = _bias(spec, q_THD.dtype)
        if bias_HT is None:
            mask_HTS = torch.zeros_like(distance_HTS, dtype=q_THD.dtype)
        else:
            index_HTS = distance_HTS.clamp(min=0).expand(len(bias_HT), -1, -1)
            mask_HTS = bias_HT[:, None].expand(-1, len(q_THD), -1).gather(2, index_HTS)
        is_hidden = distance_HTS < 0
        if spec.sliding_window is not None:
            is_hidden = is_hidden | (distance_HTS >= spec.sliding_window)
        return mask_HTS.masked_fill(is_hidden, -torch.inf)


def attend_densely(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask_HTS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by the definition, in float32 at least.

    Args:
        q_THD: Queries.
        k_KSD: Keys.
        v_KSD: Values.
        mask_HTS: Added to the logits; every query sees at least one key.
        scale: Factor on the query-key product.

    Returns:
        Outputs (T, H, D) in the dtype of the queries and log-sum-exp of the logits (T, H).
    """
    dtype = torch.promote_types(q_THD.dtype, torch.float32)
    group = q_THD.shape[1] // len(k_KSD)
    k_HSD, v_HSD = (x.to(dtype).repeat_interleave(group, dim=0) for x in (k_KSD, v_KSD))
    logits_HTS = scale * q_THD.to(dtype).transpose(0, 1) @ k_HSD.mT + mask_HTS
    lse_HT = logits_HTS.logsumexp(-1)
    o_HTD = (logits_HTS - lse_HT[..., None]).exp() @ v_HSD
    return o_HTD.transpose(0, 1).to(q_THD.dtype), lse_HT.T


def _attend_fast(
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask_HTS: Tensor, scale: float
) -> Tensor:
    o_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_KSD[None],
        v_KSD[None],
        attn_mask=mask_HTS[None],
        scale=scale,
        enable_gqa=q_THD.shape[1] > len(k_KSD),
    )
    return o_1HTD[0].transpose(0, 1)


def _bias(spec: LayerSpec, dtype: torch.dtype) -> Tensor | None:
    return None if spec.bias_HT is None else spec.bias_HT.to(dtype)
