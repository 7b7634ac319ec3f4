"""Streaming second moments of the inputs of prunable maps.

Sums are kept in float64; products of one chunk of rows may be formed in float32. Statistics of
separate parts add up, in any order. Source: arXiv 2511.19566 (Gram identity: our derivation).
"""

# Legend: I inputs of the pruned map, M rows (tokens), P columns of a panel.

import torch
from torch import Tensor

from common.errors import DataError, ShapeError

CHUNK_ROWS = 8192
"""Rows per float32 product: longer sums lose digits before they reach float64."""
PANEL = 128
"""Columns per panel: only panels on and above the diagonal are multiplied."""
MAX_SKIPPED = 1e-3


class Moments:
    """Running sums ``S2 = sum x'x``, ``S1 = sum x`` and the number of rows.

    Args:
        inputs: Length of a row.
        device: Where the sums are kept.

    Attributes:
        second_II: Sum of outer products (float64).
        first_I: Sum of rows (float64).
        count: Rows added.
        skipped: Rows left out because they held a number that is not finite.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        self.second_II = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.first_I = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.count = 0
        self.skipped = 0

    def update(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: Activations (..., I), any floating dtype, on the same device.

        Raises:
            ShapeError: if the last axis does not match.
        """
        if rows.shape[-1] != len(self.first_I):
            raise ShapeError(f"rows {tuple(rows.shape)}: expected (..., {len(self.first_I)})")
        rows_MI = rows.detach().reshape(-1, rows.shape[-1])
        if rows_MI.dtype not in (torch.float32, torch.float64):
            rows_MI = rows_MI.float()
        # One sum decides whether a closer look is needed.
        if not torch.isfinite(rows_MI.sum()):
            finite_M = torch.isfinite(rows_MI).all(dim=1)
            self.skipped += int((~finite_M).sum())
            rows_MI = rows_MI[finite_M]
        for chunk_MI in rows_MI.split(CHUNK_ROWS):
            _add_product(self.second_II, chunk_MI)
            self.first_I += chunk_MI.sum(0, dtype=torch.float64)
            self.count += len(chunk_MI)

    def merge(self, other: "Moments") -> "Moments":
        """Return the statistics of both parts together."""
        total = Moments(len(self.first_I), self.first_I.device)
        total.second_II = self.second_II + other.second_II
        total.first_I = self.first_I + other.first_I
        total.count = self.count + other.count
        total.skipped = self.skipped + other.skipped
        return total

    @property
    def mean_I(self) -> Tensor:
        """Mean row (float64)."""
        return self.first_I / max(self.count, 1)

    def gram_II(self, *, centred: bool = False) -> Tensor:
        """Return the mean outer product, or the covariance when ``centred``.

        Raises:
            DataError: if no row was added or more than one in a thousand was not finite.
        """
        seen = self.count + self.skipped
        if not self.count or self.skipped > MAX_SKIPPED * seen:
            raise DataError(
                f"activation statistics: {self.skipped} of {seen} rows were not finite; expected "
                f"at most {MAX_SKIPPED:.1%}; check the model and the calibration text"
            )
        upper_II = self.second_II.triu()
        gram_II = (upper_II + upper_II.T.tril(-1)) / self.count
        if centred:
            gram_II -= torch.outer(self.mean_I, self.mean_I)
        return gram_II


def _add_product(second_II: Tensor, chunk_MI: Tensor) -> None:
    """Add the upper triangle of ``chunk' chunk``, panel by panel."""
    inputs = chunk_MI.shape[1]
    for start in range(0, inputs, PANEL):
        panel_MP = chunk_MI[:, start : start + PANEL]
        second_II[start : start + PANEL, start:] += panel_MP.T @ chunk_MI[:, start:]
