"""Who runs in the next step, on which blocks; no tensors, no torch.

Decodes go first, then prefill chunks in order of arrival, under one token budget. Nobody overtakes.
Requests that may be compacted reserve their bounded worst case and are never preempted; others
allocate as they grow, and the newest of them is recomputed when the pool runs out.

Books: the reserved blocks plus the blocks that anybody without a reservation holds never exceed the
pool. A shared block counts once for each holder with a reservation, yet exists once; therefore a
holder that compacts away from it always finds a free block to take instead.
"""

import math
from collections import deque
from collections.abc import Iterator

from common.errors import DataError
from serve.engine.blocks import BlockManager, BlockPlan, BlockTable
from serve.engine.config import EngineConfig
from serve.engine.prefix import extend_keys, root_key
from serve.engine.request import Item, Request, Sequence, State
from serve.engine.stats import EngineStats


class Scheduler:
    """Waiting and running sequences, and the choice of each step.

    Args:
        config: Engine settings.
        blocks: Accounting of the pool.
        fingerprint: What beside tokens and settings decides cached keys and values: the model.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, fingerprint: str = "") -> None:
        self.config = config
        self.blocks = blocks
        self.fingerprint = fingerprint
        self.stats = EngineStats()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.held: dict[Sequence, list[Sequence]] = {}
        self._preempted: list[Sequence] = []
        self._most = config.max_num_seqs  # that run together: fewer after a lack of memory

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All live sequences."""
        yield from self.running
        yield from self.waiting
        for followers in self.held.values():
            yield from followers

    def check_fits(self, request: Request) -> None:
        """Raise ``DataError`` if the request cannot fit the pool even when it is alone."""
        needed = self.blocks.blocks_for(request.peak_slots)
        if needed <= self.blocks.num_blocks:
            return
        remedy, compaction = "lower max_tokens", request.compaction
        if compaction is not None:
            is_long = request.peak_slots > compaction.trigger
            remedy = "set kv.compress_prefill=true" if is_long else "lower kv.budget"
        limit = "cache_bytes" if self.config.num_blocks is None else "num_blocks"
        raise DataError(
            f"request {request.request_id!r} needs {needed} cache blocks of "
            f"{self.blocks.block_size}, the pool has {self.blocks.num_blocks}; {remedy}, "
            f"or raise engine.{limit}"
        )

    def add(self, sequence: Sequence, leader: Sequence | None = None) -> None:
        """Queue a sequence.

        Args:
            sequence: New sequence.
            leader: A sequence of the same prompt, just added. The new one waits until that prompt
                is in the cache, where caching lets it use it.

        Raises:
            DataError: if it cannot fit the pool even when it is alone.
        """
        self.check_fits(sequence.request)
        if leader is not None and self._hit_limit(sequence) >= self.blocks.block_size:
            sequence.state = State.HELD
            self.held.setdefault(leader, []).append(sequence)
        else:
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

    def shed(self) -> None:
        """Put back the newest half of what runs; more run together again as others end.

        Those stay whose tokens another computation would change: compacted and deterministic ones.
        """
        self._most = max(1, len(self.running) // 2)
        for victim in reversed(self.running[self._most :]):
            if not (victim.compressed or self.config.deterministic):
                self._preempt(victim)

    def take_preempted(self) -> list[Sequence]:
        """Return the sequences that lost their cache since the last call."""
        taken, self._preempted = self._preempted, []
        return taken

    def advance(self, items: list[Item]) -> None:
        """Record that a step's tokens are in the cache; full blocks become findable."""
        for item in items:
            sequence = item.sequence
            sequence.advance(item.count)
            self._register(sequence)
            if sequence.has_prompt:
                self._release_followers(sequence)

    def finish(self, sequence: Sequence, *, in_doubt: bool = False) -> None:
        """Take a sequence out, whatever its state, and release its blocks.

        Args:
            sequence: Live sequence.
            in_doubt: Its cache may be wrong; then nobody will find it again.
        """
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._most = min(self._most + 1, self.config.max_num_seqs)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.HELD:
            next(group for group in self.held.values() if sequence in group).remove(sequence)
        if in_doubt:
            self.blocks.forget(sequence.block_table)
        self.blocks.free(sequence.block_table)
        sequence.state = State.FINISHED
        self._release_followers(sequence)

    def due(self, items: list[Item]) -> list[Sequence]:
        """Return the live sequences of a step whose cache must be compacted before the next."""
        candidates = [item.sequence for item in items if item.sequence.state is State.RUNNING]
        return [sequence for sequence in candidates if sequence.is_due]

    def compacted(self, sequence: Sequence, plan: BlockPlan) -> None:
        """Record that the kept slots moved: a shorter table, and a smaller reservation."""
        compaction = sequence.request.compaction
        assert compaction is not None
        self.stats.compactions += 1
        self.stats.evicted_tokens += sequence.kv_len - compaction.budget
        self.stats.reclaimed_blocks += len(plan.source) - len(plan.target)
        self.blocks.commit_compaction(sequence.block_table, plan)
        sequence.kv_len = compaction.budget
        sequence.compressed = True
        sequence.compactions += 1
        worst = self.blocks.blocks_for(compaction.trigger)
        sequence.reserved = min(sequence.reserved, worst)

    def _schedule_decodes(self) -> list[Item]:
        items = []
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING or sequence.is_prefilling:
                continue
            if self._make_room(sequence) and self._grow(sequence, 1):
                items.append(Item(sequence=sequence, count=1))
        return items

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt the newest until ``sequence`` can grow; False when it was itself the newest."""
        missing = self.blocks.missing(sequence.block_table, sequence.kv_len + 1)
        if sequence.reserved or not missing:
            return True
        while missing > self._spare:
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
        self._preempted.append(victim)
        self.stats.preemptions += 1

    def _add_chunk(self, chunks: list[Item], sequence: Sequence, budget: int) -> int:
        count = min(sequence.remaining, self.config.max_num_batched_tokens)
        compaction = sequence.request.compaction
        if compaction is not None and compaction.in_prompt:
            count = min(count, compaction.trigger - sequence.kv_len)
        if self.config.deterministic:
            # Chunk ends may depend on the request alone, hence a whole chunk or none.
            count = count if count <= budget else 0
        count = min(count, budget)
        if count <= 0 or not self._grow(sequence, count):
            return 0
        chunks.append(Item(sequence=sequence, count=count))
        return count

    def _grow(self, sequence: Sequence, count: int) -> bool:
        return self.blocks.grow(sequence.block_table, sequence.kv_len + count)

    def _admit_next(self) -> bool:
        """Move the head of the queue to the running list if its blocks are there."""
        if not self.waiting or len(self.running) >= self._most:
            return False
        sequence, blocks = self.waiting[0], self.blocks
        found = self._find_prefix(sequence)
        is_reserving = self.config.deterministic or sequence.request.compress
        if is_reserving:
            needed = blocks.blocks_for(sequence.request.peak_slots)
        else:
            needed = blocks.blocks_for(len(sequence.tokens))
            needed -= sum(blocks.is_optimistic(block) for block in found)
        if needed > self._spare:
            return False
        table = BlockTable(reserving=is_reserving)
        blocks.adopt(table, found)
        # The whole prompt at once: a chunked prefill can then never wait for blocks.
        if not (is_reserving or blocks.grow(table, len(sequence.tokens))):
            blocks.free(table)
            return False
        self.waiting.popleft()
        sequence.reserved, sequence.block_table = needed if is_reserving else 0, table
        sequence.num_keyed = len(found)
        sequence.num_hit = len(found) * blocks.block_size
        sequence.advance(sequence.num_hit)
        if not sequence.preemptions:
            self.stats.prompt_tokens += len(sequence.request.prompt)
        self.stats.prefix_queries += len(sequence.tokens)
        self.stats.prefix_hits += sequence.num_hit
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return True

    @property
    def _spare(self) -> int:
        """Blocks that are neither reserved nor held without a reservation."""
        reserved = sum(sequence.reserved for sequence in self.running)
        return self.blocks.num_blocks - reserved - self.blocks.num_optimistic

    def _release_followers(self, leader: Sequence) -> None:
        """Queue those who waited for this sequence's prompt, ahead of all who came later."""
        for follower in reversed(self.held.pop(leader, [])):
            follower.state = State.WAITING
            self.waiting.appendleft(follower)

    def _hit_limit(self, sequence: Sequence) -> int:
        """Return how many of its known tokens may come out of the prefix cache."""
        if not self.config.prefix_caching:
            return 0
        request = sequence.request
        # The last token is always recomputed: its logits are needed.
        limits = [len(sequence.tokens) - 1]
        if request.prefix_limit is not None:
            limits.append(request.prefix_limit)
        if request.compaction is not None and request.compaction.in_prompt:
            limits.append(request.compaction.trigger - 1)
        return min(limits)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        block_size, limit = self.blocks.block_size, self._hit_limit(sequence)
        self._extend_keys(sequence, limit)
        found = self.blocks.match(sequence.keys[: max(0, limit) // block_size])
        if self.config.deterministic:
            # Chunks must begin where they would without the hit.
            step = math.lcm(self.config.max_num_batched_tokens, block_size) // block_size
            return found[: len(found) // step * step]
        return found

    def _register(self, sequence: Sequence) -> None:
        """Offer the full blocks that hold exactly the tokens they were filled with."""
        if not self.config.prefix_caching or sequence.compressed:
            return
        num_tokens = sequence.num_tokens
        if self.config.deterministic:
            num_tokens = min(num_tokens, self._whole_chunks(sequence.request))
        if num_tokens // self.blocks.block_size <= sequence.num_keyed:
            return
        self._extend_keys(sequence, num_tokens)
        for index in range(sequence.num_keyed, num_tokens // self.blocks.block_size):
            self.blocks.register(sequence.block_table[index], sequence.keys[index])
            sequence.num_keyed = index + 1

    def _whole_chunks(self, request: Request) -> int:
        """Return the prompt tokens in chunks of full size: others round differently."""
        chunk, length = self.config.max_num_batched_tokens, len(request.prompt)
        if request.compaction is not None and request.compaction.in_prompt:
            length = min(length, request.compaction.trigger)
        return length // chunk * chunk

    def _extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        block_size = self.blocks.block_size
        if len(sequence.keys) < num_tokens // block_size:
            root = root_key(self.fingerprint, str(block_size), sequence.request.cache_salt)
            extend_keys(sequence.keys, root, sequence.tokens, block_size, num_tokens)
