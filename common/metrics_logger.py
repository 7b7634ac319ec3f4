"""The Lightning logger that writes ``metrics.csv``; only a command that trains imports it."""

import csv
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from common import files
from common.metrics_file import METRICS_FILE, read_metrics

_FLUSH_S = 2.0


class MetricsLogger(Logger):
    """A Lightning logger that writes ``metrics.csv`` with the columns ``step`` and metric names.

    Values of the same step share a row. The file is replaced as a whole at most every two
    seconds, so a killed run leaves a readable file.

    Args:
        directory: Folder of the file.
        keep: Continue an existing file: its rows before the first step logged now stay.
    """

    def __init__(self, directory: str | Path, *, keep: bool = False) -> None:
        super().__init__()
        self._path = Path(directory) / METRICS_FILE
        self._rows: dict[int, dict[str, float]] = {}
        self._earlier = read_metrics(self._path) if keep else []
        self._columns: dict[str, None] = {}
        self._written = 0.0

    @property
    def name(self) -> str:
        """Always ``csv``."""
        return "csv"

    @property
    def version(self) -> str:
        """Empty: the run directory is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file."""
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``run.json``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of ``step`` (default: one more than the last)."""
        step = max(self._rows, default=-1) + 1 if step is None else int(step)
        if not self._rows:
            # What an interrupted run logged beyond its last checkpoint happens again now.
            for row in self._earlier:
                if row["step"] < step:
                    self._add(int(row["step"]), {k: v for k, v in row.items() if k != "step"})
        self._add(step, {name: float(value) for name, value in metrics.items() if name != "epoch"})
        if time.monotonic() - self._written > _FLUSH_S:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the file now."""
        if not self._rows:
            return
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=["step", *self._columns], lineterminator="\n")
        writer.writeheader()
        for step in sorted(self._rows):
            writer.writerow({"step": step} | self._rows[step])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_bytes(self._path, buffer.getvalue().encode())
        self._written = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.setdefault(step, {}).update(values)
        self._columns.update(dict.fromkeys(values))
