"""Connects sequences with the eviction ledger: what to observe, what to report per token."""

# Legend: R rows, N queries, Q queries of certified sequences, L layers of a group, H query heads,
# K key/value heads, D head width, V vocabulary.

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kv.eviction import EvictionLedger
from serve.kv.view import CacheView

Seen = tuple[Tensor, Tensor, Tensor, Tensor]  # queries, kept outputs, used outputs, log-sum-exps


class DeviationTracker(Companion):
    """Certified deviation of running sequences whose request asks for it.

    A sequence gets a ledger row at its first compaction: before it, its deviation is zero. What
    the layers of a group did is bounded in one go, once the last of them has attended.

    Args:
        ledger: Bounds the deviation.
        correction: Corrects attention outputs (mean tokens), or None. It belongs to the tracker,
            which must see outputs before and after.
    """

    def __init__(self, ledger: EvictionLedger, correction: Companion | None = None) -> None:
        self.ledger, self.correction = ledger, correction
        self._group = {layer: group for group in ledger.group_layers for layer in group}
        self._seen: dict[tuple[int, int | None], list[Seen]] = {}

    def attended(self, part: Part, sequences: Rows[Sequence]) -> Tensor | None:
        """Bound the deviation of every query whose sequence has lost something."""
        corrected = None
        if self.correction is not None:
            corrected = self.correction.attended(part, sequences)
        if part.lse_NH is None:
            return corrected
        rows = [sequence.ledger_row for sequence in sequences]
        pick = [i for i, row in enumerate(rows) if row is not None]
        if not pick:
            return corrected
        used_NHD = part.o_NHD if corrected is None else corrected
        seen: Seen = (part.q_NHD, part.o_NHD, used_NHD, part.lse_NH)
        if part.chunk is None and len(pick) < len(rows):
            index_Q = torch.tensor(pick, device=part.q_NHD.device)
            seen = (seen[0][index_Q], seen[1][index_Q], seen[2][index_Q], seen[3][index_Q])
        group = self._group[part.layer]
        queue = self._seen.setdefault((group[0], part.chunk), [])
        if part.layer == group[0]:
            queue.clear()
        queue.append(seen)
        if part.layer == group[-1]:
            self._observe(group, part, [rows[i] for i in pick], pick)
            queue.clear()
        return corrected

    def _observe(
        self, group: tuple[int, ...], part: Part, rows: list[int | None], pick: list[int]
    ) -> None:
        queue = self._seen[group[0], part.chunk]
        queries, outputs, corrected, lses = zip(*queue, strict=True)
        q, kept, lse = torch.stack(queries), torch.stack(outputs), torch.stack(lses)
        used = kept if self.correction is None else torch.stack(corrected)
        rows_Q = torch.tensor(rows, dtype=torch.int64, device=q.device)
        positions_Q = part.positions_N
        if part.chunk is not None:
            rows_Q = rows_Q.expand(len(positions_Q))
        elif len(pick) < len(positions_Q):
            positions_Q = positions_Q[torch.tensor(pick, device=q.device)]
        self.ledger.observe(group, rows_Q, q, kept, used, lse, positions_Q)

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Tell the ledger what is about to be lost."""
        if self.correction is not None:
            self.correction.compacting(view, sequences, keep_RKS)
        # The engine compacts certified sequences apart from the others.
        if not sequences[0].request.params.certified:
            return
        for sequence in sequences:
            if sequence.ledger_row is None:
                sequence.ledger_row = self.ledger.open()
        rows = [sequence.ledger_row or 0 for sequence in sequences]
        self.ledger.evict(view, rows, keep_RKS)

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Append what is proved of the token that each sequence is about to get."""
        asked = [i for i, s in enumerate(sequences) if s.request.params.certified]
        if not asked:
            return
        if len(asked) < len(sequences):
            sequences = [sequences[i] for i in asked]
            logits_RV = logits_RV[asked]
        # Row 0 of the ledger has lost nothing.
        deviation = self.ledger.deviation([s.ledger_row or 0 for s in sequences])
        proved_R, radius_R = deviation.top1(logits_RV)
        found = torch.stack((deviation.logits_R, proved_R.double(), radius_R), dim=1)
        for sequence, (bound, is_kept, radius) in zip(sequences, found.tolist(), strict=True):
            sequence.deviations.append(bound)
            sequence.keeps_top1.append(bool(is_kept))
            sequence.radii.append(radius)

    def close(self, sequence: Sequence) -> None:
        """Give back the row of a sequence that ended."""
        if self.correction is not None:
            self.correction.close(sequence)
        if sequence.ledger_row is not None:
            self.ledger.close(sequence.ledger_row)
            sequence.ledger_row = None
