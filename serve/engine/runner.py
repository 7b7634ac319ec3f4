"""Runs the model over the paged cache; owns the pools, knows neither scheduling nor text.

All tokens of a step form one flat axis of one-token rows, and the model is called only with its
``attend`` hook (``attention.py``), so nothing here repeats a layer.
"""

# Legend: N tokens of the step (flat), R decode rows, W table width (blocks), K key/value heads,
# S cached slots, D head width, C model width, V vocabulary.

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from common.models import LipschitzTransformer, ModelConfig
from serve.engine.attention import Batch, Chunk, LayerPool, Observer, PagedAttention
from serve.engine.blocks import BlockPlan
from serve.engine.request import Item, Sequence
from serve.kernels import compact_kv
from serve.kv import LayerView, Policy, choose

# Multiplications of a step below which a second CPU thread does not pay: about 1 ms of one core.
SMALL_WORK = 8_000_000

Evicting = Callable[[LayerView, Tensor], None]
"""Called per layer with the view and the kept slots ``keep_RKS`` before the data is moved."""


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


@contextmanager
def _few_threads(multiplications: int) -> Iterator[None]:
    """Run little work on one thread: on busy cores, waking a second one costs milliseconds."""
    threads = torch.get_num_threads()
    if threads == 1 or multiplications > SMALL_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        self.num_parameters = model.num_parameters
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
        order = sorted(range(len(items)), key=lambda index: not items[index].is_decode)
        batch = self._batch([items[index] for index in order], as_decodes)
        attend = PagedAttention(self.model, self.pools, batch, self.backend, observer)
        with _few_threads(self.num_parameters * len(batch.tokens_N)):
            x_N1C = self.model.embed(batch.tokens_N[:, None])
            x_N1C = self.model.stream(x_N1C, batch.positions_N[:, None], attend)
            if not as_decodes:
                inverse = sorted(range(len(order)), key=order.__getitem__)
                x_N1C = x_N1C[[batch.last[index] for index in inverse]]
            return self.model.logits(x_N1C)[:, 0]

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

    def _batch(self, items: list[Item], as_decodes: bool) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        tables: list[list[int]] = []
        lengths: list[int] = []
        chunks: list[Chunk] = []
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
            if as_decodes or item.is_decode:
                tables += [sequence.block_table] * item.count
                lengths += [s + 1 for s in slots]
            else:
                chunks.append(self._chunk(item, slice(start, len(tokens))))
        as_tensor = self._tensor
        return Batch(
            as_tensor(tokens),
            as_tensor(positions),
            as_tensor(blocks),
            as_tensor(offsets),
            pad_tables(tables, self.device),
            as_tensor(lengths),
            chunks,
            last,
        )

    def _chunk(self, item: Item, rows: slice) -> Chunk:
        sequence = item.sequence
        kv_len = sequence.kv_len + item.count
        table = sequence.block_table[: -(-kv_len // self.block_size)]
        return Chunk(rows, self._tensor(table)[None], kv_len, sequence.compressed)

    def _pool(self, num_blocks: int, index: int) -> LayerPool:
        layer = self.model.config.layer(index)
        shape = (num_blocks, layer.kv_heads, self.block_size)
        keys = torch.zeros(*shape, layer.head_dim, dtype=self.dtype, device=self.device)
        positions = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return LayerPool(keys, torch.zeros_like(keys), positions)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
