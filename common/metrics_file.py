"""Reading ``metrics.csv``, one row per step; ``common.metrics_logger`` writes it."""

import csv
import io
from pathlib import Path

METRICS_FILE = "metrics.csv"


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
