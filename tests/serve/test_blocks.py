"""Block accounting against a model that stores the content of every block."""

import random

import pytest

from common.errors import ConfigError
from serve.engine.blocks import BlockManager

OPERATIONS = 4000
BLOCK_SIZE = 4


class Model:
    """Oracle: tables with the token content that each block must hold, by plain dictionaries."""

    def __init__(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK_SIZE)
        self.tables: dict[int, list[int]] = {}
        self.texts: dict[int, list[int]] = {}
        self.memory: dict[tuple[int, int], int] = {}
        self.names = iter(range(10**9))

    def write(self, name: int, slot: int, token: int) -> None:
        """Store a token in its slot; the block must be private."""
        block = self.tables[name][slot // BLOCK_SIZE]
        assert self.manager.references(block) == 1, "write into a shared block"
        self.memory[block, slot % BLOCK_SIZE] = token

    def append(self, name: int, tokens: list[int]) -> None:
        """Append tokens, or verify that a refusal changed nothing."""
        text = self.texts[name]
        before, free = list(self.tables[name]), self.manager.num_free
        if not self.manager.grow(self.tables[name], len(text) + len(tokens)):
            assert self.tables[name] == before
            assert self.manager.num_free == free
            return
        for token in tokens:
            self.write(name, len(text), token)
            text.append(token)

    def compact(self, name: int, keep: list[int]) -> None:
        """Keep some slots, or verify the refusal."""
        table, text = self.tables[name], self.texts[name]
        own = sum(self.manager.references(block) == 1 for block in table)
        if self.manager.blocks_for(len(keep)) - own > self.manager.num_free:
            with pytest.raises(ConfigError, match="num_blocks"):
                self.manager.plan_compaction(table, len(keep))
            return
        plan = self.manager.plan_compaction(table, len(keep))
        assert list(plan.source) == table
        values = [text[slot] for slot in keep]
        self.manager.commit_compaction(table, plan)
        self.texts[name] = []
        for slot, token in enumerate(values):
            self.write(name, slot, token)
        self.texts[name] = values

    def verify(self) -> None:
        """Compare every table with its text."""
        self.manager.check(self.tables.values())
        for name, text in self.texts.items():
            table = self.tables[name]
            held = [self.memory[table[s // BLOCK_SIZE], s % BLOCK_SIZE] for s in range(len(text))]
            assert held == text


def step(model: Model, rng: random.Random) -> None:
    """Do one random operation on the model and the manager."""
    name = rng.choice(list(model.tables)) if model.tables else None
    kind = rng.choice(("new", "append", "append", "share", "compact", "free"))
    tokens = [rng.randrange(1000) for _ in range(rng.randrange(1, 10))]
    if kind == "new" or name is None:
        name = next(model.names)
        model.tables[name], model.texts[name] = [], []
        model.append(name, tokens)
    elif kind == "append":
        model.append(name, tokens)
    elif kind == "share":
        text = model.texts[name]
        other = next(model.names)
        model.tables[other] = model.manager.share(model.tables[name], len(text))
        model.texts[other] = text[: len(model.tables[other]) * BLOCK_SIZE]
    elif kind == "compact":
        length = len(model.texts[name])
        keep = sorted(rng.sample(range(length), rng.randrange(length + 1)))
        model.compact(name, keep)
    else:
        model.manager.free(model.tables.pop(name))
        model.texts.pop(name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_blocks", [3, 40])
def test_blocks_random_operations_follow_the_content_model(num_blocks: int, seed: int) -> None:
    """Oracle: a dictionary of block contents; no leak, no double use, no write when shared."""
    rng, model = random.Random(seed), Model(num_blocks)
    for _ in range(OPERATIONS):
        step(model, rng)
        model.verify()
        if len(model.tables) > 12:
            victim = rng.choice(list(model.tables))
            model.manager.free(model.tables.pop(victim))
            model.texts.pop(victim)
    for table in model.tables.values():
        model.manager.free(table)
    assert model.manager.num_free == num_blocks


def test_check_detects_a_leak_and_a_double_use() -> None:
    """Oracle: the invariant itself, broken by hand."""
    manager = BlockManager(4, BLOCK_SIZE)
    table: list[int] = []
    manager.grow(table, 8)
    manager.check([table])
    with pytest.raises(AssertionError, match="references"):
        manager.check([])
    with pytest.raises(AssertionError, match="references"):
        manager.check([table, table])


def test_grow_reuses_the_tail_of_a_freed_table_last() -> None:
    """Oracle: least recently freed first, and a table is freed from its tail."""
    manager = BlockManager(6, BLOCK_SIZE)
    first: list[int] = []
    manager.grow(first, 12)
    assert first == [0, 1, 2]
    manager.free(first)
    second: list[int] = []
    manager.grow(second, 24)
    assert second == [3, 4, 5, 2, 1, 0]


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_manager_rejects_empty_pools(num_blocks: int, block_size: int) -> None:
    """Oracle: the documented error."""
    with pytest.raises(ConfigError, match="expected"):
        BlockManager(num_blocks, block_size)


def test_cancel_compaction_gives_back_the_fresh_blocks() -> None:
    """Oracle: the state before the plan; a shared table needs fresh blocks."""
    manager = BlockManager(6, BLOCK_SIZE)
    table: list[int] = []
    manager.grow(table, 12)
    shared = manager.share(table, 12)
    plan = manager.plan_compaction(table, 8)
    assert len(plan.fresh) == 2
    manager.cancel_compaction(plan)
    manager.check([table, shared])
    assert manager.num_free == 3
