"""Accounting of cache blocks: who holds which, how often, and which can be found again.

A block is ``block_size`` slots of every layer. A full block whose content follows from its tokens
alone may carry a key (``prefix.py``); it is findable until its slots are needed. A block with a key
or with several holders is never written; compaction and appending respect it. No torch.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.config import positive
from common.errors import ConfigError


class BlockTable(list[int]):
    """Block ids of one sequence, in order.

    Attributes:
        reserving: Its blocks come out of a reservation; set while the table is empty.
    """

    __slots__ = ("reserving",)

    def __init__(self, *, reserving: bool = False) -> None:
        super().__init__()
        self.reserving = reserving


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """Where the kept slots of a sequence move.

    Attributes:
        table: The table it was made for.
        source: Blocks that hold the slots now.
        target: Blocks that will hold the kept ones; entry i is ``source[i]`` or a fresh block.
        fresh: Those of ``target`` that were taken from the free blocks.
    """

    table: BlockTable
    source: tuple[int, ...]
    target: tuple[int, ...]
    fresh: tuple[int, ...]


class BlockManager:
    """Free blocks, reference counts and keys of a fixed pool.

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
        self._references = [0] * num_blocks
        self._optimistic = [0] * num_blocks
        self._num_optimistic = 0
        self._blank: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a key; oldest first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, findable ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_optimistic(self) -> int:
        """Blocks that at least one table without a reservation holds."""
        return self._num_optimistic

    @property
    def num_keys(self) -> int:
        """Blocks that ``match`` can find."""
        return len(self._key_of)

    def references(self, block: int) -> int:
        """Return how many tables hold ``block``."""
        return self._references[block]

    def is_optimistic(self, block: int) -> bool:
        """Return True if a table without a reservation holds ``block``."""
        return self._optimistic[block] > 0

    def is_writable(self, block: int) -> bool:
        """Return True if ``block`` has one holder and no key."""
        return self._references[block] == 1 and block not in self._key_of

    def blocks_for(self, num_slots: int) -> int:
        """Return the number of blocks that hold ``num_slots`` slots."""
        return -(-num_slots // self.block_size)

    def missing(self, table: list[int], num_slots: int) -> int:
        """Return how many blocks ``table`` lacks to hold ``num_slots`` slots."""
        return max(0, self.blocks_for(num_slots) - len(table))

    def grow(self, table: BlockTable, num_slots: int) -> bool:
        """Extend ``table`` in place to hold ``num_slots`` slots.

        Returns:
            False, and nothing changed, when the pool has too few free blocks.
        """
        count = self.missing(table, num_slots)
        if count > self.num_free:
            return False
        for _ in range(count):
            table.append(self._take(table))
        return True

    def free(self, table: BlockTable) -> None:
        """Release and empty ``table``; the tail goes first, so that it is reused first."""
        for block in reversed(table):
            self._release(block, table)
        table.clear()

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest run of ``keys``, from the first, that are in the pool.

        Valid until the next call that takes blocks.
        """
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def adopt(self, table: BlockTable, found: Iterable[int]) -> None:
        """Append blocks from ``match`` to ``table``; they gain a holder."""
        for block in found:
            if self._references[block] == 0:
                del self._cached[block]
            self._hold(block, table)
            table.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Make a full, held block findable; a second block of the same content stays unnamed."""
        assert self._references[block] > 0, f"block {block} has no holder"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def forget(self, held: Iterable[int]) -> None:
        """Drop the keys of blocks whose content is in doubt."""
        for block in held:
            self._drop_key(block)

    def fresh_needed(self, table: list[int], num_slots: int) -> int:
        """Return how many free blocks a compaction to ``num_slots`` slots cannot do without."""
        pages = table[: self.blocks_for(num_slots)]
        return sum(self._references[block] > 1 for block in pages)

    def plan_compaction(self, table: BlockTable, num_slots: int) -> BlockPlan:
        """Choose a block for every page of the ``num_slots`` kept slots.

        A shared page moves to a fresh block. A page with a key does so while free blocks abound,
        so that it stays findable; otherwise it loses the key. Other pages stay. Fresh blocks are
        taken at once; the data is moved between this call and ``commit_compaction``.

        Raises:
            ConfigError: if the pool has fewer than ``fresh_needed`` free blocks (the reservation at
                admission prevents it for one sequence at a time).
        """
        needed, pages = self.fresh_needed(table, num_slots), table[: self.blocks_for(num_slots)]
        if needed > self.num_free:
            raise ConfigError(
                f"compaction needs {needed} free blocks, the pool has {self.num_free}; "
                "raise engine.num_blocks"
            )
        target = []
        for block in pages:
            is_shared = self._references[block] > 1
            needed -= is_shared
            is_roomy = self.num_free - needed > len(pages)
            if is_shared or (block in self._key_of and is_roomy):
                target.append(self._take(table))
            else:
                self._drop_key(block)
                target.append(block)
        fresh = tuple(new for new, old in zip(target, pages, strict=True) if new != old)
        return BlockPlan(table=table, source=tuple(table), target=tuple(target), fresh=fresh)

    def commit_compaction(self, table: BlockTable, plan: BlockPlan) -> None:
        """Make ``plan.target`` the content of ``table`` and release what is no longer held."""
        kept = set(plan.target)
        for block in reversed(table):
            if block not in kept:
                self._release(block, table)
        table[:] = plan.target

    def cancel_compaction(self, plan: BlockPlan) -> None:
        """Give back the fresh blocks of a plan that is not carried out."""
        for block in reversed(plan.fresh):
            self._release(block, plan.table)

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Verify every invariant against all live tables.

        Raises:
            AssertionError: naming the block whose accounting is wrong: an internal fault.
        """
        held, optimistic = Counter[int](), Counter[int]()
        for table in tables:
            held.update(table)
            optimistic.update(() if table.reserving else table)
        free = Counter([*self._blank, *self._cached])
        for block in range(self.num_blocks):
            count = self._references[block]
            if count != held[block] or free[block] != (count == 0):
                raise AssertionError(
                    f"block {block}: {count} references, {held[block]} holders, "
                    f"{free[block]} times among the free blocks"
                )
            is_cached = count == 0 and block in self._key_of
            if optimistic[block] != self._optimistic[block] or is_cached != (block in self._cached):
                raise AssertionError(f"block {block}: kept in the wrong books")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise AssertionError("keys and blocks disagree")
        if self._num_optimistic != sum(count > 0 for count in self._optimistic):
            raise AssertionError("blocks without a reservation are miscounted")

    def _take(self, table: BlockTable) -> int:
        """Take a free block for ``table``: blank ones first, then the longest unused."""
        if self._blank:
            block = self._blank.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._drop_key(block)
        self._hold(block, table)
        return block

    def _hold(self, block: int, table: BlockTable) -> None:
        self._references[block] += 1
        if not table.reserving:
            self._num_optimistic += self._optimistic[block] == 0
            self._optimistic[block] += 1

    def _release(self, block: int, table: BlockTable) -> None:
        self._references[block] -= 1
        if not table.reserving:
            self._optimistic[block] -= 1
            self._num_optimistic -= self._optimistic[block] == 0
        if self._references[block] == 0:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def _drop_key(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
