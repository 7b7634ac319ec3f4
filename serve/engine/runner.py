"""Runs the model over the paged cache; owns the pools, knows neither scheduling nor text.

All tokens of a step form one flat axis of one-token rows. The model is called only with its
``attend`` hook: new keys and values are written to their slots, then decode rows attend through
``paged_decode`` and prompt chunks through dense attention over their gathered pages.
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), T tokens of a chunk,
# S cached slots, H query heads, K key/value heads, D head width, V vocabulary.

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.models import LipschitzTransformer, ModelConfig
from serve.engine.blocks import BlockPlan
from serve.engine.request import Item, Sequence
from serve.kernels import compact_kv, gather_pages, paged_decode
from serve.kv import LayerView, Policy, choose

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called per layer with the decode rows' ``q_RHD``, ``o_RHD`` and log-sum-exp ``lse_RH``."""

Evicting = Callable[[LayerView, Tensor], None]
"""Called per layer with the view and the kept slots ``keep_RKS`` before the data is moved."""


@dataclass(frozen=True, slots=True)
class LayerPool:
    """Cache of one layer: keys and values (blocks, K, block_size, D), int32 positions."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A prompt chunk: its rows on the flat axis and its cache after the write."""

    rows: slice
    table_1W: Tensor
    kv_len: int
    compressed: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    tokens_N: Tensor
    positions_N: Tensor
    blocks_N: Tensor
    offsets_N: Tensor
    tables_RW: Tensor
    lengths_R: Tensor
    chunks: list[_Chunk]
    last: list[int]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block over all layers: keys, values and positions."""
    layers = [config.layer(index) for index in range(config.layers)]
    return sum(
        layer.kv_heads * block_size * (2 * layer.head_dim * dtype.itemsize + 4) for layer in layers
    )


def pad_tables(tables: list[list[int]], device: torch.device) -> Tensor:
    """Return block tables of different lengths as one int64 matrix (R, W), padded with block 0."""
    width = max(map(len, tables), default=0)
    padded = [table + [0] * (width - len(table)) for table in tables]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(tables), width)


class Runner:
    """Model and cache pools on one device.

    Args:
        model: Model in evaluation mode; its dtype is the cache's.
        num_blocks: Blocks in each layer's pool.
        block_size: Slots per block.
        backend: Kernel backend.
    """

    def __init__(
        self, model: LipschitzTransformer, num_blocks: int, block_size: int, backend: str = "auto"
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.backend = backend
        weight = model.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.pools = [self._pool(num_blocks, index) for index in range(model.config.layers)]

    @torch.inference_mode()
    def forward(
        self,
        items: list[Item],
        *,
        observer: Observer | None = None,
        as_decodes: bool = False,
    ) -> Tensor:
        """Run the next tokens of each item and write their keys and values to the cache.

        The caller has allocated the slots, and advances the sequences afterwards.

        Args:
            items: What to run; lengths of the sequences are those before the step.
            observer: Sees the attention of decode rows, ordered as their items.
            as_decodes: Treat every token as a decode row (same result up to rounding) and return
                the logits of all of them: teacher forcing over a compressed cache.

        Returns:
            Logits (items, V) after each item's last token; all tokens (N, V) with ``as_decodes``.
        """
        order = sorted(range(len(items)), key=lambda index: not self._is_decode(items[index]))
        batch = self._batch([items[index] for index in order], as_decodes)
        attend = _PagedAttention(self, batch, observer)
        x_N1C = self.model.embed(batch.tokens_N[:, None])
        x_N1C = self.model.stream(x_N1C, batch.positions_N[:, None], attend)
        if as_decodes:
            return self.model.logits(x_N1C)[:, 0]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return self.model.logits(x_N1C[[batch.last[index] for index in inverse]])[:, 0]

    @torch.inference_mode()
    def compact(
        self,
        rows: list[tuple[Sequence, BlockPlan]],
        policy: Policy,
        stats: list[Mapping[str, Tensor]] | None = None,
        evicting: Evicting | None = None,
    ) -> None:
        """Choose the slots that each sequence keeps, per layer and head, and move them.

        Args:
            rows: Sequences with the blocks their slots move to.
            policy: Chooses the slots.
            stats: Calibration statistics of each layer, for policies that need them.
            evicting: Sees what is about to be lost.
        """
        tables_RW = pad_tables([list(plan.source) for _, plan in rows], self.device)
        targets_RW = pad_tables([list(plan.target) for _, plan in rows], self.device)
        lengths_R = self._tensor([sequence.kv_len for sequence, _ in rows])
        positions_R = self._tensor([sequence.num_tokens for sequence, _ in rows])
        for index, pool in enumerate(self.pools):
            view = LayerView.of(
                self.model,
                index,
                k_pool=pool.keys,
                v_pool=pool.values,
                pos_pool=pool.positions,
                tables_RN=tables_RW,
                lengths_R=lengths_R,
                positions_R=positions_R,
                stats=None if stats is None else stats[index],
                backend=self.backend,
            )
            keep_RKS = choose(policy, view)
            if evicting is not None:
                evicting(view, keep_RKS)
            pools = (pool.keys, pool.values, pool.positions)
            compact_kv(*pools, tables_RW, keep_RKS, targets_RW, backend=self.backend)

    def _is_decode(self, item: Item) -> bool:
        return item.count == 1 and item.sequence.num_tokens > 0

    def _batch(self, items: list[Item], as_decodes: bool) -> _Batch:
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        tables: list[list[int]] = []
        lengths: list[int] = []
        chunks: list[_Chunk] = []
        last: list[int] = []
        for item in items:
            sequence, start = item.sequence, len(tokens)
            first, slot = sequence.num_tokens, sequence.kv_len
            tokens += sequence.tokens[first : first + item.count]
            positions += range(first, first + item.count)
            slots = range(slot, slot + item.count)
            blocks += [sequence.block_table[s // self.block_size] for s in slots]
            offsets += [s % self.block_size for s in slots]
            last.append(len(tokens) - 1)
            if as_decodes or self._is_decode(item):
                tables += [sequence.block_table] * item.count
                lengths += [s + 1 for s in slots]
            else:
                chunks.append(self._chunk(item, slice(start, len(tokens))))
        as_tensor = self._tensor
        return _Batch(
            as_tensor(tokens),
            as_tensor(positions),
            as_tensor(blocks),
            as_tensor(offsets),
            pad_tables(tables, self.device),
            as_tensor(lengths),
            chunks,
            last,
        )

    def _chunk(self, item: Item, rows: slice) -> _Chunk:
        sequence = item.sequence
        kv_len = sequence.kv_len + item.count
        table = sequence.block_table[: -(-kv_len // self.block_size)]
        return _Chunk(rows, self._tensor(table)[None], kv_len, sequence.compressed)

    def _pool(self, num_blocks: int, index: int) -> LayerPool:
        layer = self.model.config.layer(index)
        shape = (num_blocks, layer.kv_heads, self.block_size)
        keys = torch.zeros(*shape, layer.head_dim, dtype=self.dtype, device=self.device)
        positions = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return LayerPool(keys, torch.zeros_like(keys), positions)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


class _PagedAttention:
    """The ``attend`` hook of one step."""

    def __init__(self, runner: Runner, batch: _Batch, observer: Observer | None) -> None:
        self.runner, self.batch, self.observer = runner, batch, observer

    def __call__(self, layer: int, q_NH1D: Tensor, k_NK1D: Tensor, v_NK1D: Tensor) -> Tensor:
        batch, pool = self.batch, self.runner.pools[layer]
        where = (batch.blocks_N, slice(None), batch.offsets_N)
        pool.keys[where] = k_NK1D[:, :, 0]
        pool.values[where] = v_NK1D[:, :, 0]
        pool.positions[where] = batch.positions_N[:, None].int()
        q_NHD = q_NH1D[:, :, 0]
        parts = [self._decode(layer, q_NHD[: len(batch.lengths_R)])] if len(batch.lengths_R) else []
        parts += [self._prefill(layer, chunk, q_NHD[chunk.rows]) for chunk in batch.chunks]
        return torch.cat(parts)[:, :, None]

    def _decode(self, layer: int, q_RHD: Tensor) -> Tensor:
        batch, pool = self.batch, self.runner.pools[layer]
        o_RHD, lse_RH = paged_decode(
            q_RHD,
            pool.keys,
            pool.values,
            pool.positions,
            batch.tables_RW,
            batch.lengths_R,
            batch.positions_N[: len(q_RHD)],
            self._scale(layer),
            self._bias(layer, q_RHD.dtype),
            backend=self.runner.backend,
        )
        if self.observer is not None:
            self.observer(layer, q_RHD, o_RHD, lse_RH)
        return o_RHD

    def _prefill(self, layer: int, chunk: _Chunk, q_THD: Tensor) -> Tensor:
        pool = self.runner.pools[layer]
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

    def _mask(self, layer: int, chunk: _Chunk, q_THD: Tensor) -> Tensor:
        """Return the causal mask plus the bias at original positions, (1, 1 or H, T, S)."""
        pages_KS = gather_pages(self.runner.pools[layer].positions, chunk.table_1W)[0]
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
        bias_HT = self.runner.model.layers[layer].attention.position_bias
        return None if bias_HT is None else bias_HT.to(dtype)

    def _scale(self, layer: int) -> float:
        return self.runner.model.config.layer(layer).logit_scale
