"""The course of a run as a file and a chart: residual against oracle calls."""

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

from common.files import write_bytes
from common.reporting.convergence import Course, convergence_svg
from solvers.solution import Result

TRACE_FILE, PLOT_FILE = "trace.csv", "residual.svg"
_MAX_ROWS = 500  # spaced evenly on a logarithmic axis


class Row(NamedTuple):
    """One iteration: oracle calls so far, residual there, smallest so far, constant in use."""

    iteration: int
    calls: int
    residual: float
    best: float
    lipschitz: float

    def metrics(self) -> dict[str, float]:
        """Return what the loggers get."""
        return {"solve/residual": self.residual, "solve/evals": float(self.calls)}


def residual_trace(result: Result, scale: int = 1) -> list[Row]:
    """Return the course of a run, thinned out evenly in the logarithm of the iteration.

    Args:
        result: Of the run.
        scale: Component calls that one call of the run stands for.

    Returns:
        At most about 500 rows, the first and the last iteration among them; ``best`` takes every
        iteration into account.
    """
    kept, rows, best = _kept(len(result.trace)), [], math.inf
    for iteration, point in enumerate(result.trace):
        best = min(best, point.residual)
        if iteration in kept:
            rows.append(Row(iteration, scale * point.calls, point.residual, best, point.lipschitz))
    return rows


def write_trace(directory: Path, rows: list[Row], name: str) -> dict[str, Path]:
    """Write ``trace.csv`` and ``residual.svg``.

    Args:
        directory: Where to.
        rows: The course.
        name: Of the curve.

    Returns:
        Artifact name to path.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    write_bytes(directory / TRACE_FILE, buffer.getvalue().encode())
    course = Course(label=name, calls=[row.calls for row in rows], best=[row.best for row in rows])
    write_bytes(directory / PLOT_FILE, convergence_svg([course]).encode())
    return {"trace": directory / TRACE_FILE, "plot": directory / PLOT_FILE}


def _kept(count: int) -> set[int]:
    if count <= _MAX_ROWS:
        return set(range(count))
    ratio = math.log(count) / (_MAX_ROWS - 1)
    return {round(math.exp(ratio * place)) - 1 for place in range(_MAX_ROWS)}
