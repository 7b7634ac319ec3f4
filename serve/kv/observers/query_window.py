"""The most recent queries of each sequence."""

# Legend: R rows of a call, T tokens of a chunk, N queries to store, W window, H query heads, D head
# width.

from collections import Counter
from collections.abc import Sequence

import torch

from serve.decoder import Decoder, LayerSpec
from serve.kv.observer import Attended
from serve.kv.observers.rows import RowObserver, Tensors


class QueryWindow(RowObserver):
    """Keeps the last queries of each layer after RoPE, as ``queries`` and ``positions``.

    A query's place is its position modulo the window: the order within is not that of time.

    Args:
        decoder: Supplies shapes, device and dtype.
        window: Queries kept; ``positions`` is -1 where there were fewer.
    """

    def __init__(self, decoder: Decoder, window: int) -> None:
        super().__init__(decoder)
        self.window = window

    def empty(self, spec: LayerSpec, rows: int) -> Tensors:
        """Return no queries: (rows, W, H, D) zeros and positions (rows, W) of -1."""
        shape = (rows, self.window, spec.heads, spec.head_dim)
        return {
            "queries": torch.zeros(shape, dtype=self.dtype, device=self.device),
            "positions": torch.full(shape[:2], -1, device=self.device),
        }

    @torch.inference_mode()
    def attended(self, event: Attended) -> None:
        """Store the newest queries of each row."""
        if event.layer not in self.specs:
            return
        state, window = self.state[event.layer], self.window
        q_NHD = event.q_RTHD[:, -window:].flatten(0, 1)
        positions_N = event.positions_RT[:, -window:].flatten()
        rows = list(event.rows)
        if event.q_RTHD.shape[1] > 1:
            rows = [row for row in rows for _ in range(len(q_NHD) // len(rows))]
        elif len(set(rows)) < len(rows):
            newest = _newest(rows, window)
            rows, pick = [rows[i] for i in newest], self.index(newest)
            q_NHD, positions_N = q_NHD[pick], positions_N[pick]
        where = (self.index(rows), positions_N % window)
        state["queries"][where] = q_NHD.to(self.dtype)
        state["positions"][where] = positions_N


def _newest(rows: Sequence[int], count: int) -> list[int]:
    """Return the last ``count`` indices of each row: a text may come as many decode rows."""
    seen: Counter[int] = Counter()
    newest = []
    for index in reversed(range(len(rows))):
        seen[rows[index]] += 1
        if seen[rows[index]] <= count:
            newest.append(index)
    return newest
