"""Tokens of certified sequences whose bounds are not computed yet: a few, then all at once.

Between two compactions the tokens of a sequence see the same summary, so that bounding many of
them costs little more than bounding one.
"""

# Legend: Q sequences of a step, S sequences, T tokens of each.

import torch
from torch import Tensor

from serve.kv.block_bound import Queries

MOST = 16  # tokens of a sequence that may wait


class Pending:
    """Waiting tokens in the layers of one shape; one row per sequence."""

    def __init__(self) -> None:
        self._tables: list[Tensor] = []

    def put(self, rows_Q: Tensor, slots_Q: Tensor, capacity: int, queries: Queries) -> None:
        """Keep one more token of each sequence.

        Args:
            rows_Q: Its row.
            slots_Q: Its place among those of its sequence, below ``MOST``.
            capacity: Rows that there are.
            queries: The tokens (S = Q, T = 1).
        """
        fields = (queries.q, queries.kept, queries.used, queries.lse, queries.positions)
        if not self._tables:
            self._tables = [x.new_zeros(0, MOST, *x.shape[2:]) for x in fields]
        missing = capacity - len(self._tables[0])
        if missing > 0:
            self._tables = [
                torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in self._tables
            ]
        for table, field in zip(self._tables, fields, strict=True):
            table[rows_Q, slots_Q] = field[:, 0]

    def take(self, rows_S: Tensor, tokens: int) -> Queries:
        """Return the first ``tokens`` of some sequences; those never put hold anything."""
        # Such a row may be newer than the tables.
        rows_S = rows_S.clamp(max=len(self._tables[0]) - 1)
        return Queries(*(table[rows_S, :tokens] for table in self._tables))
