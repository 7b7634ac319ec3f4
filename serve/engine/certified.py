"""Connects sequences with the eviction ledger: which rows to observe, what to report per token."""

# Legend: R rows, V vocabulary.

from collections.abc import Sequence as Rows

from torch import Tensor

from serve.engine.attention import Observer
from serve.engine.request import Item, Sequence
from serve.engine.runner import Evicting
from serve.kv import LayerView
from serve.kv.eviction import EvictionLedger


class DeviationTracker:
    """Certified deviation of running sequences; does nothing without a ledger.

    A sequence gets a ledger row at its first compaction: before it, its deviation is zero.
    """

    def __init__(self, ledger: EvictionLedger | None) -> None:
        self.ledger = ledger

    def observer(self, items: Rows[Item], *, as_decodes: bool = False) -> Observer | None:
        """Return the observer of a forward pass over ``items``, None if none lost anything."""
        ledger = self.ledger
        rows: list[int | None] = []
        for item in items:
            if as_decodes or item.is_decode:
                rows += [item.sequence.ledger_row] * item.count
        chosen = [(i, row) for i, row in enumerate(rows) if row is not None]
        if ledger is None or not chosen:
            return None
        pick, ledger_rows = [i for i, _ in chosen], [row for _, row in chosen]

        def observe(layer: int, q: Tensor, o: Tensor, lse: Tensor, positions: Tensor) -> None:
            ledger.observe(layer, ledger_rows, q[pick], o[pick], lse[pick], positions[pick])

        return observe

    def evicting(self, sequences: Rows[Sequence]) -> Evicting | None:
        """Return what tells the ledger of a compaction of ``sequences``."""
        ledger = self.ledger
        if ledger is None:
            return None
        for sequence in sequences:
            if sequence.ledger_row is None:
                sequence.ledger_row = ledger.open()
        rows = [sequence.ledger_row for sequence in sequences if sequence.ledger_row is not None]

        def evict(view: LayerView, keep_RKS: Tensor) -> None:
            ledger.evict(view, rows, keep_RKS)

        return evict

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Append the bound at the token that each sequence is about to get."""
        if self.ledger is None:
            return
        lost = [i for i, sequence in enumerate(sequences) if sequence.ledger_row is not None]
        bounds, keeps = [0.0] * len(sequences), [True] * len(sequences)
        if lost:
            rows = [row for s in sequences if (row := s.ledger_row) is not None]
            deviation = self.ledger.deviation(rows)
            values = zip(
                lost,
                deviation.logits_R.tolist(),
                deviation.keeps_top1(logits_RV[lost]).tolist(),
                strict=True,
            )
            for index, bound, keep in values:
                bounds[index], keeps[index] = bound, keep
        for sequence, bound, keep in zip(sequences, bounds, keeps, strict=True):
            sequence.deviations.append(bound)
            sequence.keeps_top1.append(keep)

    def close(self, sequence: Sequence) -> None:
        """Give back the row of a sequence that ended."""
        if self.ledger is not None and sequence.ledger_row is not None:
            self.ledger.close(sequence.ledger_row)
            sequence.ledger_row = None
