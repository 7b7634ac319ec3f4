"""Carries out the compactions that are due: blocks are planned, data is moved, books are kept."""

from collections.abc import Iterator

from serve.engine.blocks import BlockPlan
from serve.engine.request import Sequence
from serve.engine.runner import Runner, Stats
from serve.engine.scheduler import Scheduler
from serve.kv import Policy


class Compactor:
    """Cuts caches to their budget, many sequences in one launch.

    Args:
        scheduler: Keeps the books.
        runner: Moves the data.
        policy: Chooses what stays; None where nothing is ever due.
        stats: Calibration statistics of each layer, for policies that need them.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, policy: Policy | None, stats: Stats
    ) -> None:
        self.scheduler, self.runner = scheduler, runner
        self.policy, self.stats = policy, stats

    def compact(self, due: list[Sequence]) -> None:
        """Compact the sequences, in as few launches as their blocks allow."""
        blocks = self.scheduler.blocks
        for group in self._groups(due):
            rows: list[tuple[Sequence, BlockPlan]] = []
            for sequence in group:
                assert sequence.request.compaction is not None
                budget = sequence.request.compaction.budget
                if rows and blocks.fresh_needed(sequence.block_table, budget) > blocks.num_free:
                    # Those before it give up what they shared with it.
                    self._move(rows)
                    rows = []
                rows.append((sequence, blocks.plan_compaction(sequence.block_table, budget)))
            self._move(rows)

    def _groups(self, due: list[Sequence]) -> Iterator[list[Sequence]]:
        if self.scheduler.config.deterministic:
            yield from ([sequence] for sequence in due)
            return
        # The ledger follows a group as a whole or not at all.
        for is_certified in (True, False):
            group = [s for s in due if s.request.params.certified == is_certified]
            if group:
                yield group

    def _move(self, rows: list[tuple[Sequence, BlockPlan]]) -> None:
        assert self.policy is not None
        try:
            self.runner.compact(rows, self.policy, self.stats)
        except BaseException:
            for _, plan in rows:
                self.scheduler.blocks.cancel_compaction(plan)
            raise
        for sequence, plan in rows:
            self.scheduler.compacted(sequence, plan)
