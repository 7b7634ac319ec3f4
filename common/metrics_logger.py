"""``metrics.csv`` as a Lightning logger; only a command that trains imports it."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from common.metrics_file import MetricsFile

_FLUSH_S = 2.0


class MetricsLogger(Logger):
    """A Lightning logger that writes a ``MetricsFile``, at most every two seconds.

    Args:
        directory: Folder of the file.
        keep: Continue an existing file, as ``MetricsFile`` does.
    """

    def __init__(self, directory: str | Path, *, keep: bool = False) -> None:
        super().__init__()
        self._file = MetricsFile(directory, keep=keep)
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
        return str(self._file.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``run.json``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of ``step`` (default: one more than the last)."""
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self._file.add(values, step)
        if time.monotonic() - self._written > _FLUSH_S:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the file now."""
        self._file.save()
        self._written = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()
