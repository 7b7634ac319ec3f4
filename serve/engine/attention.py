"""Attention of one engine step over the paged cache, as a decoder's ``attend`` hook.

New keys and values are written to their slots first; then decode rows attend over their pages, and
prompt chunks over theirs (``chunks.py``). On a GPU a kernel writes (``kernel_attention.py``).
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), S cached slots,
# H query heads, K key/value heads, D head width.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.batch import Batch
from serve.engine.chunks import ChunkAttention
from serve.engine.pools import LayerPool, Pools, SlotWriter
from serve.kernels import paged_decode


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


class PagedAttention(ABC):
    """The ``attend`` hook of one step; subclasses write to the cache, each in its way.

    Args:
        specs: Attention of each layer.
        pools: The cache; written in place.
        batch: What runs.
        backend: Kernel backend.
        listener: Sees, and may correct, the attention of every layer.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        pools: Pools,
        batch: Batch,
        backend: str = "auto",
        listener: Listener | None = None,
    ) -> None:
        self.specs, self.pools, self.batch = specs, pools.layers, batch
        self.backend, self.listener = backend, listener
        self.decodes = batch.decodes
        self.chunks = [ChunkAttention(c, batch.positions_N[c.rows]) for c in batch.chunks]

    @abstractmethod
    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Write keys and values (N, K, D), return outputs (N, H, D); all are rotated."""

    def attend(self, layer: int, q_NHD: Tensor, new: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return outputs (N, H, D) over the cache; ``new`` are keys and values, when known."""
        if not self.chunks:
            return self._decode(layer, q_NHD)
        outputs = [self._decode(layer, q_NHD[: self.decodes])] if self.decodes else []
        for index, chunk in enumerate(self.chunks):
            rows = chunk.chunk.rows
            new_T = None if new is None else (new[0][rows], new[1][rows])
            outputs.append(self._prefill(layer, index, q_NHD[rows], new_T))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @cached_property
    def _is_out_R1S(self) -> Tensor:
        """Which slots of the decode rows are not filled."""
        width = self.batch.tables.padded_RW.shape[1] * self.pools[0].keys.shape[2]
        slot_S = torch.arange(width, device=self.batch.lengths_R.device)
        return slot_S >= self.batch.lengths_R[:, None, None]

    @cached_property
    def _positions_R(self) -> Tensor:
        return self.batch.positions_N[: self.decodes]

    def _decode(self, layer: int, q_RHD: Tensor) -> Tensor:
        batch, pool, spec = self.batch, self.pools[layer], self.specs[layer]
        tables, positions_R = batch.tables, self._positions_R
        if tables.plan is not None:
            o_RHD, z_RHS = tables.plan.attend(
                layer, q_RHD, pool, spec, positions_R, self._is_out_R1S
            )
            if self.listener is None:
                return o_RHD
            lse_RH = z_RHS.logsumexp(-1)
        else:
            o_RHD, lse_RH = paged_decode(
                q_RHD,
                *pool.tensors,
                tables.padded_RW,
                batch.lengths_R,
                positions_R,
                spec.scale,
                None if spec.bias_HT is None else spec.bias_HT.to(q_RHD.dtype),
                window=spec.sliding_window,
                backend=self.backend,
            )
        where = (positions_R, tables.padded_RW, batch.lengths_R, pool)
        return self._heard(Part(layer, None, q_RHD, o_RHD, lse_RH, *where))

    def _prefill(
        self, layer: int, index: int, q_THD: Tensor, new: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        part, pool = self.chunks[index], self.pools[layer]
        o_THD, lse_TH = part.attend(q_THD, new, pool, self.specs[layer])
        where = (part.positions_T, part.chunk.table_1W, part.chunk.length_1, pool)
        return self._heard(Part(layer, index, q_THD, o_THD, lse_TH, *where))

    def _heard(self, part: Part) -> Tensor:
        return part.o_NHD if self.listener is None else self.listener.attended(part)


class TorchAttention(PagedAttention):
    """Attention with torch's own operations; positions are written once for all layers."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        pools: Pools,
        batch: Batch,
        backend: str = "auto",
        listener: Listener | None = None,
    ) -> None:
        super().__init__(specs, pools, batch, backend, listener)
        self.writer = SlotWriter(pools, batch.positions_N, batch.slots_N)
        pools.wipe(batch.opened)

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """Write keys and values (N, K, D), return outputs (N, H, D)."""
        self.writer.write(layer, k_NKD, v_NKD)
        return self.attend(layer, q_NHD, (k_NKD, v_NKD))
