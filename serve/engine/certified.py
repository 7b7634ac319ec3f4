"""Connects sequences with the eviction ledger: what to observe, what to report per token."""

# Legend: R rows, N queries, H query heads, K key/value heads, V vocabulary.

from collections.abc import Sequence as Rows

from torch import Tensor

from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kv.eviction import EvictionLedger
from serve.kv.view import CacheView


class DeviationTracker(Companion):
    """Certified deviation of running sequences.

    A sequence gets a ledger row at its first compaction: before it, its deviation is zero.
    """

    def __init__(self, ledger: EvictionLedger) -> None:
        self.ledger = ledger

    def attended(self, part: Part, sequences: Rows[Sequence]) -> None:
        """Bound the deviation of every query whose sequence has lost something."""
        if part.lse_NH is None:
            return
        if part.chunk is not None:
            sequences = list(sequences) * len(part.q_NHD)
        chosen = [(i, s.ledger_row) for i, s in enumerate(sequences) if s.ledger_row is not None]
        if not chosen:
            return
        pick, rows = [i for i, _ in chosen], [row for _, row in chosen]
        self.ledger.observe(
            part.layer,
            rows,
            part.q_NHD[pick],
            part.o_NHD[pick],
            part.lse_NH[pick],
            part.positions_N[pick],
        )

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Tell the ledger what is about to be lost; all sequences want that or none does."""
        if not sequences[0].request.params.certified:
            return
        for sequence in sequences:
            if sequence.ledger_row is None:
                sequence.ledger_row = self.ledger.open()
        rows = [sequence.ledger_row for sequence in sequences if sequence.ledger_row is not None]
        self.ledger.evict(view, rows, keep_RKS)

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Append the bound at the token that each sequence is about to get."""
        wanted = [i for i, s in enumerate(sequences) if s.request.params.certified]
        if len(wanted) < len(sequences):
            sequences, logits_RV = [sequences[i] for i in wanted], logits_RV[wanted]
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
        if sequence.ledger_row is not None:
            self.ledger.close(sequence.ledger_row)
            sequence.ledger_row = None
