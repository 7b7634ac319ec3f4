"""Accounting of cache blocks: who holds which, and how often; no tensors, no torch.

A block is ``block_size`` slots of every layer. Tables are plain lists of block ids owned by the
sequences. A block with more than one holder is never written; compaction and appending respect it.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from common.config import positive
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """Where the kept slots of a sequence move.

    Attributes:
        source: Blocks that hold the slots now.
        target: Blocks that will hold the kept ones; may contain blocks of ``source``.
        fresh: Those of ``target`` that were taken from the free list.
    """

    source: tuple[int, ...]
    target: tuple[int, ...]
    fresh: tuple[int, ...]


class BlockManager:
    """Free list and reference counts of a fixed pool.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Slots per block.

    Raises:
        ConfigError: if either is not positive.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        positive("num_blocks", num_blocks)
        positive("block_size", block_size)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """Return how many tables hold ``block``."""
        return self._references[block]

    def blocks_for(self, num_slots: int) -> int:
        """Return the number of blocks that hold ``num_slots`` slots."""
        return -(-num_slots // self.block_size)

    def missing(self, table: list[int], num_slots: int) -> int:
        """Return how many blocks ``table`` lacks to hold ``num_slots`` slots."""
        return max(0, self.blocks_for(num_slots) - len(table))

    def grow(self, table: list[int], num_slots: int) -> bool:
        """Extend ``table`` in place to hold ``num_slots`` slots.

        Returns:
            False, and nothing changed, when the pool has too few free blocks.
        """
        count = self.missing(table, num_slots)
        if count > self.num_free:
            return False
        table.extend(self._take() for _ in range(count))
        return True

    def share(self, table: list[int], num_slots: int) -> list[int]:
        """Return a second table on the full blocks among the first ``num_slots`` slots.

        The tail of a partly filled block is left out, hence no later append writes a shared block.
        """
        shared = table[: num_slots // self.block_size]
        for block in shared:
            self._references[block] += 1
        return shared

    def free(self, table: list[int]) -> None:
        """Release and empty ``table``; the tail goes first, so that it is reused first."""
        for block in reversed(table):
            self._release(block)
        table.clear()

    def plan_compaction(self, table: list[int], num_slots: int) -> BlockPlan:
        """Choose blocks for the ``num_slots`` kept slots: own unshared ones first, then free ones.

        Fresh blocks are taken at once; the data is moved between this call and
        ``commit_compaction``.

        Raises:
            ConfigError: if the pool cannot supply them (the reservation at admission prevents it).
        """
        count = self.blocks_for(num_slots)
        own = [block for block in table if self._references[block] == 1][:count]
        if count - len(own) > self.num_free:
            raise ConfigError(
                f"compaction needs {count - len(own)} free blocks, the pool has {self.num_free}; "
                "raise engine.num_blocks"
            )
        fresh = tuple(self._take() for _ in range(count - len(own)))
        return BlockPlan(source=tuple(table), target=(*own, *fresh), fresh=fresh)

    def commit_compaction(self, table: list[int], plan: BlockPlan) -> None:
        """Make ``plan.target`` the content of ``table`` and release what is no longer held."""
        kept = set(plan.target)
        for block in reversed(table):
            if block not in kept:
                self._release(block)
        table[:] = plan.target

    def cancel_compaction(self, plan: BlockPlan) -> None:
        """Give back the fresh blocks of a plan that is not carried out."""
        for block in reversed(plan.fresh):
            self._release(block)

    def check(self, tables: Iterable[list[int]]) -> None:
        """Verify every invariant against all live tables.

        Raises:
            AssertionError: naming the block whose accounting is wrong: an internal fault.
        """
        held = Counter(block for table in tables for block in table)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            count = self._references[block]
            if count != held[block] or free[block] != (count == 0):
                raise AssertionError(
                    f"block {block}: {count} references, {held[block]} holders, "
                    f"{free[block]} times in the free list"
                )

    def _take(self) -> int:
        block = self._free.popleft()
        self._references[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)
