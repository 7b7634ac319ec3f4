"""Streaming second moments of the inputs of prunable maps, and the walk that visits them.

Sums are kept in float64; products of one chunk of rows may be formed in float32. Statistics of
separate parts add up, in any order. Source: arXiv 2511.19566 (Gram identity: our derivation).
"""

# Legend: B sequences, T tokens, C width, I inputs of the pruned map, M rows (tokens).

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from common.errors import DataError, ShapeError

log = logging.getLogger(__name__)

CHUNK_ROWS = 8192
"""Rows per float32 product: longer sums lose digits before they reach float64."""
PANEL = 128
"""Columns per panel: only panels on and above the diagonal are multiplied."""
MAX_SKIPPED = 1e-3
ROWS_PER_INPUT = 2


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


class Calibration:
    """The residual streams of the calibration text, moved through the model layer by layer.

    Only the stream of one position in depth is held, so that memory does not grow with depth.
    The last sequences are held out: they measure the error of what the others chose.

    Args:
        model: Transformer; its embedding starts the streams.
        tokens_BT: Token ids (sequences, length).
        holdout: Fraction of the sequences to hold out, at least one unless zero.
        batch_tokens: Tokens processed at a time.
    """

    def __init__(
        self, model: Any, tokens_BT: Tensor, *, holdout: float = 0.1, batch_tokens: int = 16384
    ):
        sequences, length = tokens_BT.shape
        held = min(sequences - 1, max(1, round(holdout * sequences))) if holdout > 0 else 0
        if sequences < 1:
            raise DataError(f"{sequences} calibration sequences: expected at least 1; add text")
        per_batch = max(1, batch_tokens // length)
        device = next(model.parameters()).device
        with torch.no_grad():
            self.streams = [
                model.embed(part.to(device))
                for group in tokens_BT.split([sequences - held, held])
                for part in group.split(per_batch)
                if len(part)
            ]
        self.fitted = -(-(sequences - held) // per_batch)
        self.tokens = (sequences - held) * length

    @torch.no_grad()
    def apply(self, block: Callable[[Tensor], Tensor]) -> None:
        """Replace every stream by ``block(stream)``."""
        self.streams = [block(x_BTC) for x_BTC in self.streams]

    @torch.no_grad()
    def moments(
        self,
        inputs: Callable[[Tensor], Tensor],
        width: int,
        *,
        block: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Moments, Moments]:
        """Return the statistics of ``inputs(stream)``: fitted part and held-out part.

        With nothing held out both are the fitted part.

        Args:
            inputs: From a stream (B, T, C) to rows (B, T, width).
            width: Length of a row.
            block: If given, every stream is replaced by ``block(stream, rows)`` on the way.
        """
        device = self.streams[0].device
        fitted, held = Moments(width, device), Moments(width, device)
        for index, x_BTC in enumerate(self.streams):
            rows_BTI = inputs(x_BTC)
            (fitted if index < self.fitted else held).update(rows_BTI)
            if block is not None:
                self.streams[index] = block(x_BTC, rows_BTI)
        if fitted.count < ROWS_PER_INPUT * width:
            log.warning(
                "%d calibration tokens for %d inputs: the fit is unreliable below %d; "
                "raise compress.tokens",
                fitted.count,
                width,
                ROWS_PER_INPUT * width,
            )
        return fitted, held if held.count else fitted


def collect(model: Any, calibration: Calibration) -> Iterator[tuple[int, Moments, Moments]]:
    """Walk the dense model once and yield the statistics of every MLP's down projection.

    Args:
        model: Transformer.
        calibration: Fresh streams; they end up after the last attention block.

    Yields:
        Layer index, fitted and held-out statistics.
    """
    for index, layer in enumerate(model.layers):
        calibration.apply(layer.attend_block)
        is_last = index + 1 == len(model.layers)
        fitted, held = calibration.moments(
            layer.mlp.hidden,
            layer.mlp.down.in_features,
            block=None if is_last else _finish_block(layer),
        )
        yield index, fitted, held


def _finish_block(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the MLP block for hidden activations that are already known."""
    a = layer.layer.mlp_residual
    return lambda x_BTC, rows_BTI: (1 - a) * x_BTC + a * layer.mlp.down(rows_BTI)
