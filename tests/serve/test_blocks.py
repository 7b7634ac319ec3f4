"""Block accounting against a model that stores the content of every block."""

import random

import pytest

from common.errors import ConfigError
from serve.engine.blocks import BlockManager, BlockTable
from serve.engine.prefix import extend_keys, root_key

OPERATIONS = 3000
BLOCK_SIZE = 4
ROOT = root_key("model", "float64")


class Held:
    """A simulated sequence: its table, the tokens it has seen and those in its slots."""

    def __init__(self, tokens: list[int], *, reserving: bool) -> None:
        self.table = BlockTable(reserving=reserving)
        self.tokens = tokens
        self.slots: list[int] = []
        self.keys: list[bytes] = []
        self.compacted = False


class Model:
    """Oracle: the token content of every slot and the meaning of every key, by dictionaries."""

    def __init__(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.live: list[Held] = []
        self.memory: dict[tuple[int, int], int] = {}
        self.meaning: dict[bytes, tuple[int, ...]] = {}
        self.hits = self.kept_findable = self.lost_keys = 0

    def write(self, held: Held, slot: int, token: int) -> None:
        """Store a token in its slot; the block must be private and without a key."""
        block = held.table[slot // BLOCK_SIZE]
        assert self.manager.is_writable(block), "write into a shared or findable block"
        self.memory[block, slot % BLOCK_SIZE] = token

    def extend_keys(self, held: Held, num_tokens: int) -> None:
        """Compute keys and note independently what each stands for."""
        extend_keys(held.keys, ROOT, held.tokens, BLOCK_SIZE, num_tokens)
        assert len(held.keys) >= num_tokens // BLOCK_SIZE
        for index, key in enumerate(held.keys):
            chain = tuple(held.tokens[: (index + 1) * BLOCK_SIZE])
            assert self.meaning.setdefault(key, chain) == chain

    def start(self, tokens: list[int], *, reserving: bool) -> None:
        """Begin a sequence with whatever prefix is in the pool, all but its last token."""
        held = Held(tokens, reserving=reserving)
        self.extend_keys(held, len(tokens) - 1)
        found = self.manager.match(held.keys)
        self.manager.adopt(held.table, found)
        held.slots = tokens[: len(found) * BLOCK_SIZE]
        self.hits += len(found)
        self.live.append(held)
        self.fill(held)

    def fill(self, held: Held) -> None:
        """Cache the tokens that are not yet, or verify that a refusal changed nothing."""
        new = held.tokens[len(held.slots) :] if not held.compacted else [1, 2, 3]
        before, free = list(held.table), self.manager.num_free
        if not self.manager.grow(held.table, len(held.slots) + len(new)):
            assert held.table == before
            assert self.manager.num_free == free
            return
        for token in new:
            self.write(held, len(held.slots), token)
            held.slots.append(token)
        if not held.compacted:
            self.extend_keys(held, len(held.slots))
            for block, key in zip(held.table, held.keys, strict=False):
                self.manager.register(block, key)

    def compact(self, held: Held, keep: list[int]) -> None:
        """Keep some slots where the rules put them, or verify the refusal; or change one's mind."""
        manager, pages = self.manager, -(-len(keep) // BLOCK_SIZE)
        if manager.fresh_needed(held.table, len(keep)) > manager.num_free:
            with pytest.raises(ConfigError, match="num_blocks"):
                manager.plan_compaction(held.table, len(keep))
            return
        keys, free = manager.num_keys, manager.num_free
        plan = manager.plan_compaction(held.table, len(keep))
        assert list(plan.source) == held.table
        assert len(plan.target) == pages
        sources = {block for other in self.live for block in other.table}
        for old, new in zip(plan.source, plan.target, strict=False):
            assert new == old or new not in sources
            assert manager.is_writable(new)
        if len(keep) % 5 == 4:
            manager.cancel_compaction(plan)
            return
        self.kept_findable += free > 3 * pages and manager.num_keys == keys
        self.lost_keys += manager.num_keys < keys
        values = [held.slots[slot] for slot in keep]
        manager.commit_compaction(held.table, plan)
        held.slots, held.compacted = values, True
        for slot, token in enumerate(values):
            self.write(held, slot, token)

    def end(self, held: Held, *, in_doubt: bool = False) -> None:
        """Release a sequence."""
        if in_doubt:
            self.manager.forget(held.table)
        self.manager.free(held.table)
        self.live.remove(held)

    def verify(self) -> None:
        """Compare every table with its slots, and every findable block with its key."""
        self.manager.check(held.table for held in self.live)
        for held in self.live:
            table = held.table
            places = [divmod(slot, BLOCK_SIZE) for slot in range(len(held.slots))]
            assert [self.memory[table[page], offset] for page, offset in places] == held.slots
        findable = 0
        for key, chain in self.meaning.items():
            for block in self.manager.match([key]):
                findable += 1
                content = [self.memory[block, offset] for offset in range(BLOCK_SIZE)]
                assert content == list(chain[-BLOCK_SIZE:])
        assert findable == self.manager.num_keys


def step(model: Model, rng: random.Random) -> None:
    """Do one random operation; few different tokens, so that prefixes recur."""
    held = rng.choice(model.live) if model.live else None
    kind = rng.choice(("start", "start", "append", "append", "compact", "end", "end", "doubt"))
    if kind == "start" or held is None:
        length = rng.randrange(1, 24)
        tokens = [0] * rng.randrange(length) if rng.random() < 0.7 else []
        tokens += [rng.randrange(2) for _ in range(length - len(tokens))]
        model.start(tokens, reserving=rng.random() < 0.5)
    elif kind == "append":
        if not held.compacted:
            held.tokens = held.tokens + [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
        model.fill(held)
    elif kind == "compact":
        length = len(held.slots)
        model.compact(held, sorted(rng.sample(range(length), rng.randrange(length + 1))))
    else:
        model.end(held, in_doubt=kind == "doubt" and rng.random() < 0.3)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_blocks", [3, 14, 80])
def test_blocks_random_operations_follow_the_content_model(num_blocks: int, seed: int) -> None:
    """Oracle O4: contents and meanings by dictionaries; no leak, no write when shared or keyed."""
    rng, model = random.Random(seed), Model(num_blocks)
    for _ in range(OPERATIONS):
        step(model, rng)
        model.verify()
        if len(model.live) > 8:
            model.end(rng.choice(model.live))
    for held in list(model.live):
        model.end(held)
    assert model.manager.num_free == num_blocks
    assert model.manager.num_optimistic == 0
    assert model.hits > 100
    # Both branches of the choice between a fresh block and the own, renounced one were taken.
    assert model.lost_keys > 20 or num_blocks == 80
    assert model.kept_findable > 20 or num_blocks == 3


def test_check_detects_a_leak_and_a_double_use() -> None:
    """Oracle: the invariant itself, broken by hand."""
    manager, table = BlockManager(4, BLOCK_SIZE), BlockTable()
    manager.grow(table, 8)
    manager.check([table])
    with pytest.raises(AssertionError, match="references"):
        manager.check([])
    with pytest.raises(AssertionError, match="references"):
        manager.check([table, table])
    table.reserving = True
    with pytest.raises(AssertionError, match="wrong books"):
        manager.check([table])


def test_grow_takes_blank_blocks_first_and_findable_ones_by_age() -> None:
    """Oracle: the order of release; of one table the tail goes before the head."""
    manager, root = BlockManager(6, BLOCK_SIZE), root_key("m")
    first, second, keys = BlockTable(), BlockTable(), list[bytes]()
    extend_keys(keys, root, list(range(12)), BLOCK_SIZE, 12)
    manager.grow(first, 12)
    for block, key in zip(first, keys, strict=True):
        manager.register(block, key)
    manager.free(first)
    assert manager.match(keys) == [0, 1, 2]
    manager.grow(second, 16)
    assert second == [3, 4, 5, 2]
    assert manager.match(keys) == [0, 1]
    manager.grow(second, 24)
    assert second == [3, 4, 5, 2, 1, 0]
    assert manager.num_keys == 0


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_manager_rejects_empty_pools(num_blocks: int, block_size: int) -> None:
    """Oracle: the documented error."""
    with pytest.raises(ConfigError, match="expected"):
        BlockManager(num_blocks, block_size)


def test_cancel_compaction_gives_back_the_fresh_blocks() -> None:
    """Oracle: the state before the plan; shared pages need fresh blocks."""
    manager, table, other = BlockManager(6, BLOCK_SIZE), BlockTable(), BlockTable(reserving=True)
    manager.grow(table, 12)
    manager.adopt(other, table[:2])
    plan = manager.plan_compaction(table, 8)
    assert len(plan.fresh) == 2
    manager.cancel_compaction(plan)
    manager.check([table, other])
    assert manager.num_free == 3


def test_keys_depend_on_everything_before_a_block() -> None:
    """Oracle: injectivity, checked over salts, parents, token order and sizes."""
    roots = [root_key("ab", "c"), root_key("a", "bc"), root_key("abc"), root_key("abc", "")]
    texts = [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 8, 7], [0, 2, 3, 4, 5, 6, 7, 8]]
    seen = set()
    for root in roots:
        for tokens in texts:
            keys: list[bytes] = []
            extend_keys(keys, root, tokens, BLOCK_SIZE, 7)
            assert len(keys) == 1
            extend_keys(keys, root, tokens, BLOCK_SIZE, 8)
            again: list[bytes] = []
            extend_keys(again, root, tokens, BLOCK_SIZE, 8)
            assert keys == again
            seen.update(keys)
    # Texts 0 and 1 share their first block under each root, nothing else coincides.
    assert len(seen) == len(roots) * 5
    assert {len(key) for key in seen} == {16}
