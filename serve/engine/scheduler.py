"""Who runs in the next step, on which blocks; no tensors, no torch.

Decodes go first, then prefill chunks in order of arrival, under one token budget. Nobody overtakes.
Requests that may be compacted reserve their bounded worst case and are never preempted; others
allocate as they grow, and the newest of them is recomputed when the pool runs out.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from common.config import check_types, one_of, positive
from common.errors import ConfigError, DataError
from serve.engine.blocks import BlockManager, BlockPlan
from serve.engine.request import Item, Sequence, State


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Size and behaviour of the engine.

    Attributes:
        block_size: Cache slots per block, a power of two up to 256.
        num_blocks: Blocks in the pool; None fits ``max_num_seqs`` full contexts or ``cache_bytes``.
        cache_bytes: Upper limit of an automatically sized pool, in bytes.
        max_num_seqs: Requests that run at the same time.
        max_num_batched_tokens: Tokens per step: decodes first, the rest prefill chunks.
        deterministic: Make tokens bit for bit independent of other requests in every dtype: each
            request runs its own matrix products on fixed chunks, with all memory reserved. Slower.
        dtype: Weights and cache: "float32", "float64" or "bfloat16"; None keeps the model's.
        backend: Kernels: "auto" (Triton on CUDA where there is one) or "torch".
        certificate: Bound the logits deviation of every token when the model has a certificate.
        debug: Check the block accounting after every step.

    Raises:
        ConfigError: for an impossible value.
    """

    block_size: int = 16
    num_blocks: int | None = None
    cache_bytes: int = 2**30
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    deterministic: bool = False
    dtype: Literal["float32", "float64", "bfloat16"] | None = None
    backend: str = "auto"
    certificate: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "cache_bytes", "max_num_seqs", "max_num_batched_tokens"):
            positive(f"engine.{name}", getattr(self, name))
        if self.num_blocks is not None:
            positive("engine.num_blocks", self.num_blocks)
        if self.block_size & (self.block_size - 1) or self.block_size > 256:
            raise ConfigError(
                f"engine.block_size={self.block_size}: expected a power of two up to 256; round it"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: expected at least "
                f"max_num_seqs={self.max_num_seqs}, one token for each request; raise it"
            )
        # "triton" alone is for single kernels: attention has none, so no engine could run on it.
        one_of("engine.backend", self.backend, ("auto", "torch"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """When a cache is compacted: at lengths that depend on the request alone.

    Attributes:
        budget: Slots kept.
        interval: A cache of ``budget + interval`` slots is cut to ``budget``.
    """

    budget: int
    interval: int

    @property
    def trigger(self) -> int:
        """Physical length at which a cache is compacted."""
        return self.budget + self.interval

    def may_happen(self, sequence: Sequence) -> bool:
        """Return True if the request can reach the trigger with a token still to come."""
        request = sequence.request
        return request.compress and request.max_cached > self.trigger

    def is_due(self, sequence: Sequence) -> bool:
        """Return True if the cache must be cut now; never inside a prompt."""
        # The chunk before the last prompt token looks like a decode: compare with the prompt.
        if not sequence.request.compress or sequence.num_tokens < len(sequence.request.prompt):
            return False
        return sequence.kv_len >= self.trigger


class Scheduler:
    """Waiting and running sequences, and the choice of each step.

    Args:
        config: Engine settings.
        blocks: Accounting of the pool.
        compaction: Trigger rule; None never compacts.
    """

    def __init__(
        self, config: EngineConfig, blocks: BlockManager, compaction: Compaction | None = None
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.compaction = compaction
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All live sequences."""
        yield from self.running
        yield from self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            DataError: if it cannot fit the pool even when it is alone.
        """
        needed = self.blocks.blocks_for(self._peak_slots(sequence))
        if needed > self.blocks.num_blocks:
            raise DataError(
                f"request {sequence.request.request_id!r} needs {needed} cache blocks of "
                f"{self.blocks.block_size}, the pool has {self.blocks.num_blocks}; lower max_tokens"
                " or raise engine.num_blocks"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Item]:
        """Choose the next step and allocate its blocks.

        Returns:
            Decodes, then prefill chunks; empty only when nothing is left to do.
        """
        budget = self.config.max_num_batched_tokens
        items = self._schedule_decodes()
        if not self.config.deterministic:
            budget -= len(items)
        chunks: list[Item] = []
        for sequence in self.running:
            if sequence.is_prefilling:
                budget -= self._add_chunk(chunks, sequence, budget)
        while budget > 0 and self._admit_next():
            budget -= self._add_chunk(chunks, self.running[-1], budget)
        return items + chunks

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and release its blocks."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.block_table)
        sequence.state = State.FINISHED

    def due(self, items: list[Item]) -> list[Sequence]:
        """Return the live sequences of a step whose cache must be compacted before the next."""
        if self.compaction is None:
            return []
        candidates = [item.sequence for item in items if item.sequence.state is State.RUNNING]
        return [sequence for sequence in candidates if self.compaction.is_due(sequence)]

    def compacted(self, sequence: Sequence, plan: BlockPlan) -> None:
        """Record that the kept slots moved: a shorter table, and a smaller reservation."""
        assert self.compaction is not None
        self.blocks.commit_compaction(sequence.block_table, plan)
        sequence.kv_len = self.compaction.budget
        sequence.compressed = True
        sequence.compactions += 1
        worst = self.blocks.blocks_for(self.compaction.trigger)
        sequence.reserved = min(sequence.reserved, worst)

    def _schedule_decodes(self) -> list[Item]:
        items = []
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING or sequence.is_prefilling:
                continue
            if self._make_room(sequence):
                self.blocks.grow(sequence.block_table, sequence.kv_len + 1)
                items.append(Item(sequence=sequence, count=1))
        return items

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt the newest until ``sequence`` can grow; False when it was itself the newest."""
        while self.blocks.missing(sequence.block_table, sequence.kv_len + 1) > self._spare(
            sequence
        ):
            victim = next(other for other in reversed(self.running) if not other.reserved)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self.blocks.free(victim.block_table)
        victim.reset()
        self.waiting.appendleft(victim)

    def _add_chunk(self, chunks: list[Item], sequence: Sequence, budget: int) -> int:
        count = min(sequence.remaining, budget)
        if self.config.deterministic:
            # Chunk ends may depend on the request alone, hence a whole chunk or none.
            whole = min(sequence.remaining, self.config.max_num_batched_tokens)
            count = whole if whole <= budget else 0
        if count > 0:
            chunks.append(Item(sequence=sequence, count=count))
        return max(count, 0)

    def _admit_next(self) -> bool:
        """Move the head of the queue to the running list if its blocks are there."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return False
        sequence = self.waiting[0]
        if self._is_reserving(sequence):
            needed = self.blocks.blocks_for(self._peak_slots(sequence))
        else:
            needed = self.blocks.blocks_for(len(sequence.tokens))
        if needed > self._spare(None):
            return False
        self.waiting.popleft()
        sequence.reserved = needed if self._is_reserving(sequence) else 0
        # The whole prompt at once: a chunked prefill can then never wait for blocks.
        self.blocks.grow(sequence.block_table, len(sequence.tokens))
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return True

    def _is_reserving(self, sequence: Sequence) -> bool:
        if self.config.deterministic:
            return True
        return self.compaction is not None and self.compaction.may_happen(sequence)

    def _peak_slots(self, sequence: Sequence) -> int:
        """Return the most slots that the sequence can occupy at any time."""
        request = sequence.request
        if self.compaction is None or not self.compaction.may_happen(sequence):
            return request.max_cached
        return min(request.max_cached, max(len(request.prompt), self.compaction.trigger))

    def _spare(self, sequence: Sequence | None) -> int:
        """Return the free blocks that ``sequence`` may take: all but those reserved for others."""
        if sequence is not None and sequence.reserved:
            return self.blocks.num_free
        outstanding = sum(
            other.reserved - len(other.block_table) for other in self.running if other.reserved
        )
        return self.blocks.num_free - outstanding
