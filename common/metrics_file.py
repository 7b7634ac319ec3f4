"""``metrics.csv``, one row per step: written and read without Lightning."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from common import files

METRICS_FILE = "metrics.csv"


class MetricsFile:
    """A ``metrics.csv`` with the columns ``step`` and metric names; values of a step share a row.

    Args:
        directory: Folder of the file.
        keep: Continue an existing file: its rows before the first step added now stay.
    """

    def __init__(self, directory: str | Path, *, keep: bool = False) -> None:
        self.path = Path(directory) / METRICS_FILE
        self._rows: dict[int, dict[str, float]] = {}
        self._earlier = read_metrics(self.path) if keep else []
        self._columns: dict[str, None] = {}

    def add(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of ``step`` (default: one more than the last)."""
        step = max(self._rows, default=-1) + 1 if step is None else int(step)
        if not self._rows:
            # What an interrupted run logged beyond its last checkpoint happens again now.
            for row in self._earlier:
                if row["step"] < step:
                    self._merge(int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        self._merge(step, metrics)

    def save(self) -> None:
        """Replace the file as a whole, so that a killed run leaves a readable one."""
        if not self._rows:
            return
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=["step", *self._columns], lineterminator="\n")
        writer.writeheader()
        for step in sorted(self._rows):
            writer.writerow({"step": step} | self._rows[step])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_bytes(self.path, buffer.getvalue().encode())

    def _merge(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.setdefault(step, {}).update(values)
        self._columns.update(dict.fromkeys(values))


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Return the rows of a ``metrics.csv``, empty cells left out; [] when there is no file.

    Rows that cannot be read (a file cut short by other tools) are left out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return []
    rows = []
    for record in csv.DictReader(io.StringIO(text)):
        try:
            row = {k: float(v) for k, v in record.items() if v not in (None, "")}
        except (TypeError, ValueError):
            continue
        if "step" in row:
            rows.append(row)
    return rows
