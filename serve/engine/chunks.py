"""Attention of prompt chunks: dense, over the chunk itself or over its gathered pages."""

# Legend: T tokens of a chunk, W table width (blocks), S cached slots, H query heads, K key/value
# heads, D head width.

import torch
import torch.nn.functional as F
from torch import Tensor

from serve.decoder import LayerSpec
from serve.engine.batch import Chunk
from serve.engine.pools import LayerPool
from serve.kernels import gather_pages


class ChunkAttention:
    """One prompt chunk in all layers of a step.

    Args:
        chunk: Which.
        positions_T: Original positions of its tokens.
    """

    def __init__(self, chunk: Chunk, positions_T: Tensor) -> None:
        self.chunk, self.positions_T = chunk, positions_T
        self._distance_1TS: Tensor | None = None
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, q_THD: Tensor, new: tuple[Tensor, Tensor] | None, pool: LayerPool, spec: LayerSpec
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the cache, which holds the chunk already.

        Args:
            q_THD: Queries after RoPE.
            new: Keys and values of the chunk itself (T, K, D), when known.
            pool: Cache of the layer.
            spec: The layer.

        Returns:
            Outputs (T, H, D), and log-sum-exps (T, H) if the cache was compacted.
        """
        chunk = self.chunk
        if chunk.is_alone and new is not None:
            k_KSD, v_KSD = (x_TKD.transpose(0, 1) for x_TKD in new)
        else:
            k_KSD, v_KSD = (
                gather_pages(x, chunk.table_1W)[0, :, : chunk.kv_len]
                for x in (pool.keys, pool.values)
            )
        is_plain = spec.bias_HT is None and spec.sliding_window is None
        # Torch scales its own causal mask as well: minus infinity times 0.
        if chunk.is_alone and is_plain and spec.scale != 0:
            return _attend_fast(q_THD, k_KSD, v_KSD, None, spec.scale), None
        mask_HTS = self._mask_of(pool, spec, q_THD.dtype)
        if chunk.compressed:
            return attend_densely(q_THD, k_KSD, v_KSD, mask_HTS, spec.scale)
        return _attend_fast(q_THD, k_KSD, v_KSD, mask_HTS, spec.scale), None

    def _mask_of(self, pool: LayerPool, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
        """Return the mask of a layer; layers without a bias share theirs before compaction."""
        if spec.bias_HT is not None or self.chunk.compressed:
            return self._mask(pool, spec, dtype)
        if spec.sliding_window not in self._masks:
            self._masks[spec.sliding_window] = self._mask(pool, spec, dtype)
        return self._masks[spec.sliding_window]

    def _mask(self, pool: LayerPool, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
        """Return the causal mask plus the bias at original positions, (1 or H, T, S)."""
        distance_HTS = self._distance(pool, spec)
        if spec.bias_HT is None:
            mask_HTS = torch.zeros_like(distance_HTS, dtype=dtype)
        else:
            bias_H1T = spec.bias_HT.to(dtype)[:, None]
            index_HTS = distance_HTS.clamp(min=0).expand(spec.heads, -1, -1)
            mask_HTS = bias_H1T.expand(-1, index_HTS.shape[1], -1).gather(2, index_HTS)
        is_hidden = distance_HTS < 0
        if spec.sliding_window is not None:
            is_hidden = is_hidden | (distance_HTS >= spec.sliding_window)
        return mask_HTS.masked_fill(is_hidden, -torch.inf)

    def _distance(self, pool: LayerPool, spec: LayerSpec) -> Tensor:
        """Return how far each slot lies before each query (1 or H, T, S)."""
        if not self.chunk.compressed:
            # Before any compaction slot i holds token i, in every layer and head.
            if self._distance_1TS is None:
                slot_S = torch.arange(self.chunk.kv_len, device=self.positions_T.device)
                self._distance_1TS = (self.positions_T[:, None] - slot_S)[None]
            return self._distance_1TS
        pos_KS = gather_pages(pool.positions, self.chunk.table_1W)[0, :, : self.chunk.kv_len]
        pos_HS = pos_KS.long().repeat_interleave(spec.group, dim=0)
        return self.positions_T[:, None] - pos_HS[:, None]


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
    q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, mask_HTS: Tensor | None, scale: float
) -> Tensor:
    o_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1)[None],
        k_KSD[None],
        v_KSD[None],
        attn_mask=None if mask_HTS is None else mask_HTS[None],
        is_causal=mask_HTS is None,
        scale=scale,
        enable_gqa=q_THD.shape[1] > len(k_KSD),
    )
    return o_1HTD[0].transpose(0, 1)
