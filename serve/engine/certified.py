"""Connects sequences with the eviction ledger: what to observe, what to report per token."""

# Legend: R rows, N queries, S sequences, T tokens of each, L layers of a group, H query heads,
# K key/value heads, D head width, V vocabulary.

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kv.block_bound import OUTWARD, Queries
from serve.kv.eviction import EvictionLedger
from serve.kv.margin import FARTHEST
from serve.kv.pending import MOST
from serve.kv.view import CacheView

Seen = tuple[Tensor, Tensor, Tensor, Tensor]  # queries, kept outputs, used outputs, log-sum-exps


class DeviationTracker(Companion):
    """Certified deviation of running sequences whose request asks for it.

    A sequence gets a ledger row at its first compaction: before it, its deviation is zero. Decoded
    tokens wait and are bounded together, at the next compaction, at the end, after ``MOST`` tokens
    or when ``settle`` is called; until then their entries are missing from the sequence.

    Args:
        ledger: Bounds the deviation.
        correction: Corrects attention outputs (mean tokens), or None. It belongs to the tracker,
            which must see outputs before and after.
    """

    def __init__(self, ledger: EvictionLedger, correction: Companion | None = None) -> None:
        self.ledger, self.correction = ledger, correction
        self._group = {i: group.layers for group in ledger.groups.values() for i in group.layers}
        self._seen: dict[tuple[int, int | None], list[Seen]] = {}
        # Of each sequence with a row: waiting tokens that were recorded, and their margins.
        self._recorded: dict[Sequence, list[tuple[int, float]]] = {}

    def attended(self, part: Part, sequences: Rows[Sequence]) -> Tensor | None:
        """Note every query whose sequence has lost something."""
        corrected = None
        if self.correction is not None:
            corrected = self.correction.attended(part, sequences)
        pick = [i for i, sequence in enumerate(sequences) if sequence.ledger_row is not None]
        if part.lse_NH is None or not pick:
            return corrected
        seen: Seen = (part.q_NHD, part.o_NHD, part.o_NHD, part.lse_NH)
        if corrected is not None:
            seen = (part.q_NHD, part.o_NHD, corrected, part.lse_NH)
        group = self._group[part.layer]
        queue = self._seen.setdefault((group[0], part.chunk), [])
        if part.layer == group[0]:
            queue.clear()
        queue.append(seen)
        if part.layer == group[-1]:
            self._observe(group, part, [sequences[i] for i in pick], pick)
            queue.clear()
        return corrected

    def _observe(
        self, group: Rows[int], part: Part, sequences: list[Sequence], pick: list[int]
    ) -> None:
        rows, queries = [s.ledger_row or 0 for s in sequences], self._queries(group, part)
        if part.chunk is not None:
            self._settle(sequences)
            self.ledger.observe(group, rows, queries.as_one())
            return
        if len(pick) < len(part.q_NHD):
            queries = queries.some(torch.tensor(pick, device=part.q_NHD.device))
        if len(set(rows)) < len(rows):
            self._settle(sequences)
            self.ledger.observe(group, rows, queries)
            return
        self._settle([s for s in sequences if self.ledger.waiting(s.ledger_row or 0) == MOST])
        self.ledger.note(group, rows, [s.num_tokens for s in sequences], queries)

    def _queries(self, group: Rows[int], part: Part) -> Queries:
        """Return what the group's layers saw, each query as a sequence of one token."""
        columns = zip(*self._seen[group[0], part.chunk], strict=True)
        q, kept, used, lse = (torch.stack(x, dim=1)[:, None] for x in columns)
        used = kept if self.correction is None else used
        return Queries(q, kept, used, lse, part.positions_N[:, None])

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Tell the ledger what is about to be lost."""
        if self.correction is not None:
            self.correction.compacting(view, sequences, keep_RKS)
        # The engine compacts certified sequences apart from the others.
        if not sequences[0].request.params.certified:
            return
        self.settle(sequences)
        for sequence in sequences:
            if sequence.ledger_row is None:
                sequence.ledger_row = self.ledger.open()
        rows = [sequence.ledger_row or 0 for sequence in sequences]
        self.ledger.evict(view, rows, keep_RKS)

    def record(self, sequences: Rows[Sequence], logits_RV: Tensor) -> None:
        """Take the margin of the token that each sequence is about to get."""
        asked = [i for i, s in enumerate(sequences) if s.request.params.certified]
        if not asked:
            return
        if len(asked) < len(sequences):
            logits_RV = logits_RV[asked]
        margins = self.ledger.margins.distance(logits_RV).tolist()
        full = []
        for i, margin in zip(asked, margins, strict=True):
            sequence = sequences[i]
            if sequence.ledger_row is None:
                self._append(sequence, 0.0, margin)
                continue
            waiting = self.ledger.waiting(sequence.ledger_row)
            self._recorded.setdefault(sequence, []).append((waiting, margin))
            # A stop string ends a text before the engine knows: its proofs must not lag behind.
            if waiting in (0, MOST) or sequence.request.params.stop:
                full.append(sequence)
        if full:
            self.settle(full)

    def settle(self, sequences: Rows[Sequence]) -> None:
        """Bound the waiting tokens of these sequences, and of others that have many."""
        due = [sequence for sequence in sequences if sequence.ledger_row is not None]
        if not due:
            return
        many = MOST // 2
        for sequence in self._recorded:
            row = sequence.ledger_row
            if row is not None and self.ledger.waiting(row) >= many:
                due.append(sequence)
        self._settle(due)

    def _settle(self, sequences: Rows[Sequence]) -> None:
        """Bound the waiting tokens of these alone: amid a step others are noted in part."""
        due = list(dict.fromkeys(s for s in sequences if s.ledger_row is not None))
        if not due:
            return
        bounds = self.ledger.settle([sequence.ledger_row or 0 for sequence in due])
        for sequence, streams in zip(due, bounds, strict=True):
            for index, margin in self._recorded.pop(sequence, []):
                self._append(sequence, streams[index], margin)

    def close(self, sequence: Sequence) -> None:
        """Give back the row of a sequence that ended."""
        if self.correction is not None:
            self.correction.close(sequence)
        if sequence.ledger_row is not None:
            self.settle([sequence])
            self.ledger.close(sequence.ledger_row)
            sequence.ledger_row = None

    def _append(self, sequence: Sequence, stream: float, margin: float) -> None:
        """Report a token, given the movement of its stream and what that may be at most."""
        left = max(margin - stream, 0.0) / self.ledger.certificate.stream * (1 - OUTWARD)
        sequence.deviations.append(stream * self.ledger.to_logits)
        sequence.keeps_top1.append(stream == 0 or margin > stream)
        sequence.radii.append(min(left, FARTHEST))
