"""Streaming second moments of the inputs of prunable maps.

Sums are kept in float64; products of one chunk of rows may be formed in float32. Statistics of
separate parts add up, in any order. Source: arXiv 2511.19566 (Gram identity: our derivation).
"""

# Legend: I inputs of the pruned map, M rows (tokens), P columns of a panel.

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import DataError, ShapeError

CHUNK_ROWS = 8192
"""Rows per float32 product: longer sums lose digits before they reach float64."""
PANEL = 128
"""Columns per panel on GPUs: only panels on and above the diagonal are multiplied."""
MAX_SKIPPED = 1e-3


class Moments:
    """Running sums ``S2 = sum x'x``, ``S1 = sum x`` and the number of rows.

    Args:
        inputs: Length of a row.
        device: Where the rows are; the sums are kept there, see ``sums_device``.

    Attributes:
        second_II: Sum of outer products (float64).
        first_I: Sum of rows (float64).
        count: Rows added.
        skipped: Rows left out because they held a number that is not finite.
    """

    def __init__(self, inputs: int, device: torch.device | str = "cpu"):
        kind = {"dtype": torch.float64, "device": sums_device(device)}
        self.second_II = torch.zeros(inputs, inputs, **kind)
        self.first_I = torch.zeros(inputs, **kind)
        self.count = 0
        self.skipped = 0

    def update(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: Activations (..., I), any floating dtype.

        Raises:
            ShapeError: if the last axis does not match.
        """
        if rows.shape[-1] != len(self.first_I):
            raise ShapeError(f"rows {tuple(rows.shape)}: expected (..., {len(self.first_I)})")
        # Devices without float64 keep their sums on the CPU: the products follow them there.
        rows_MI = rows.detach().reshape(-1, rows.shape[-1]).to(self.second_II.device)
        if rows_MI.dtype not in (torch.float32, torch.float64):
            rows_MI = rows_MI.float()
        with full_precision(rows_MI.device.type):
            for chunk_MI in rows_MI.split(CHUNK_ROWS):
                self._add(chunk_MI)

    def _add(self, chunk_MI: Tensor) -> None:
        sum_I = chunk_MI.sum(0)
        # The sum decides whether a closer look is needed.
        if not bool(torch.isfinite(sum_I).all()):
            finite_M = torch.isfinite(chunk_MI).all(dim=1)
            self.skipped += int((~finite_M).sum())
            chunk_MI = chunk_MI[finite_M]
            sum_I = chunk_MI.sum(0, dtype=torch.float64)
        _add_product(self.second_II, chunk_MI)
        self.first_I += sum_I
        self.count += len(chunk_MI)

    def merge(self, other: "Moments") -> "Moments":
        """Return the statistics of both parts together, on this one's device."""
        total = Moments(len(self.first_I), self.first_I.device)
        total.second_II = self.second_II + other.second_II.to(self.second_II.device)
        total.first_I = self.first_I + other.first_I.to(self.first_I.device)
        total.count = self.count + other.count
        total.skipped = self.skipped + other.skipped
        return total

    def all_reduce(self) -> None:
        """Add up the sums of all processes of ``torch.distributed``, in place."""
        counts = torch.tensor([self.count, self.skipped], device=self.first_I.device)
        for total in (self.second_II, self.first_I, counts):
            dist.all_reduce(total)
        self.count, self.skipped = counts.tolist()

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """Second moments of every target's inputs.

    Attributes:
        fitted: Per target name, of the inputs that choose and fit.
        apart: Of the inputs held out; empty where nothing is.
    """

    fitted: dict[str, Moments]
    apart: dict[str, Moments]

    @property
    def held(self) -> dict[str, Moments]:
        """What measures the error: the inputs held out, or ``fitted`` where there are none."""
        return self.apart or self.fitted

    def merge(self, other: "Statistics") -> "Statistics":
        """Return the statistics of both parts together; their order does not matter.

        Raises:
            DataError: when they are of different targets.
        """
        sizes, others = (
            {name: len(moments.first_I) for name, moments in part.fitted.items()}
            for part in (self, other)
        )
        if sizes != others:
            raise DataError(
                f"statistics of {sizes} and of {others} (inputs per target): expected the same "
                "targets; merge parts of one model's pass"
            )
        return Statistics(
            fitted=_merged(self.fitted, other.fitted), apart=_merged(self.apart, other.apart)
        )

    def all_reduce(self) -> None:
        """Add up all processes' statistics in place; every process calls it, same targets."""
        for moments in (*self.fitted.values(), *self.apart.values()):
            moments.all_reduce()


def _merged(first: dict[str, Moments], second: dict[str, Moments]) -> dict[str, Moments]:
    both = {name: first[name].merge(second[name]) for name in first.keys() & second.keys()}
    return {name: both.get(name, moments) for name, moments in (first | second).items()}


def sums_device(device: torch.device | str) -> torch.device:
    """Return where float64 sums of rows on a device are kept: there, or on the CPU for MPS."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever TF32 setting or autocast surrounds this."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add_product(second_II: Tensor, chunk_MI: Tensor) -> None:
    """Add ``chunk' chunk``, at least its upper triangle."""
    if chunk_MI.device.type != "cpu":
        _add_panels(second_II, chunk_MI)
        return
    # NumPy sees the symmetry and forms one triangle; torch has no such product.
    rows_MI = chunk_MI.numpy()
    second_II += torch.from_numpy(rows_MI.T @ rows_MI)


def _add_panels(second_II: Tensor, chunk_MI: Tensor) -> None:
    """Add the upper triangle of ``chunk' chunk``, panel by panel."""
    inputs = chunk_MI.shape[1]
    for start in range(0, inputs, PANEL):
        panel_MP = chunk_MI[:, start : start + PANEL]
        second_II[start : start + PANEL, start:] += panel_MP.T @ chunk_MI[:, start:]
