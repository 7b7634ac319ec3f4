"""Connects sequences with the observer of the cache policy."""

# Legend: R rows (layer-major), K key/value heads, S slots.

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from serve.engine.attention import Part
from serve.engine.companions import Companion
from serve.engine.request import Sequence
from serve.kernels import compact_kv
from serve.kv.observer import Attended, Observer
from serve.kv.view import CacheView


class Evidence(Companion):
    """What the policy's observer knows of the running sequences."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._rows: dict[Sequence, int] = {}
        # The last observed token and layer of each sequence: a step may have to run again.
        self._newest: dict[Sequence, tuple[int, int]] = {}

    def rows(self, sequences: Rows[Sequence]) -> list[int]:
        """Return the observer row of each sequence, opening those that have none."""
        for sequence in sequences:
            if sequence not in self._rows:
                self._rows[sequence] = self.observer.open()
        return [self._rows[sequence] for sequence in sequences]

    def attended(self, part: Part, sequences: Rows[Sequence]) -> None:
        """Tell the observer of the queries of requests that may be compacted."""
        watched = [
            i
            for i, sequence in enumerate(sequences)
            if sequence.request.compress and self._is_news(sequence, part.layer)
        ]
        if not watched:
            return
        q, positions = part.q_NHD[:, None], part.positions_N[:, None]
        tables, lengths = part.tables_RW, part.lengths_R
        if part.chunk is not None:
            q, positions = part.q_NHD[None], part.positions_N[None]
        elif len(watched) < len(sequences):
            q, positions, tables, lengths = (x[watched] for x in (q, positions, tables, lengths))
        event = Attended(
            layer=part.layer,
            rows=self.rows([sequences[i] for i in watched]),
            q_RTHD=q,
            positions_RT=positions,
            k_pool=part.pool.keys,
            pos_pool=part.pool.positions,
            tables_RW=tables,
            lengths_R=lengths,
        )
        self.observer.attended(event)
        for index in watched:
            sequence = sequences[index]
            self._newest[sequence] = sequence.num_tokens, part.layer

    def compacting(self, view: CacheView, sequences: Rows[Sequence], keep_RKS: Tensor) -> None:
        """Let the observer follow the slots."""
        slots = view.tables_RN.shape[1] * view.pos_pool.shape[2]
        self.observer.moved(view.layers, self.rows(sequences), sources(keep_RKS, slots))

    def close(self, sequence: Sequence) -> None:
        """Give back the observer's row."""
        self._newest.pop(sequence, None)
        row = self._rows.pop(sequence, None)
        if row is not None:
            self.observer.close(row)

    def _is_news(self, sequence: Sequence, layer: int) -> bool:
        newest = self._newest.get(sequence)
        return newest is None or newest < (sequence.num_tokens, layer)


def sources(keep_RKS: Tensor, slots: int) -> Tensor:
    """Return the slot from which a compaction fills each of the first slots (R, K, kept).

    Args:
        keep_RKS: Kept slots, ascending.
        slots: Slots of a row.
    """
    rows, kv_heads, kept = keep_RKS.shape
    # The rule is the kernel's: move a pool of slot numbers, one page per row, as it moves keys.
    number_S = torch.arange(slots, device=keep_RKS.device)
    pool_RKS = number_S.expand(rows, kv_heads, slots).contiguous()
    table_R1 = torch.arange(rows, device=keep_RKS.device)[:, None]
    compact_kv([pool_RKS], table_R1, keep_RKS, table_R1, backend="torch")
    return pool_RKS[:, :, :kept]
