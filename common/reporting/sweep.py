"""Comparison of the runs of a sweep: one table, and plots where a setting is a number."""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

from common.metric_names import METRICS
from common.reporting.charts import SERIES_TONES, Series, key, line_chart
from common.reporting.frontier import (
    LABELS,
    SECONDS,
    constants,
    frontier,
    frontier_columns,
    read_points,
)
from common.reporting.page import code, escape, figure, figures, kind, number, page, section, table
from common.reporting.radius import radius_section
from common.reporting.runs import StageRun
from common.reporting.solving import comparison_of_methods

# Shown first and, where a run has no objective, used to order the table; smaller is better.
_FIRST = (
    "train/val_bits_per_byte",
    "compress/val_bits_per_byte",
    "serve/kl_vs_full",
    "cert/tightened",
    "cert/naive",
    "compress/certified_deviation",
    "solve/residual",
)
_PRUNING = (
    *("compress/val_bits_per_byte", "compress/kl_nats", "compress/naive", "compress/tightened"),
    *("compress/certified_deviation", "compress/measured_deviation", "compress/forward_speedup"),
    *("compress/decode_speedup", "compress/flops_fraction", "compress/params"),
)
"""Columns of a sweep of ``compress``: those of the frontier of a single run."""
_MOST_COLUMNS = 7
_MOST_LINES = 5
_LOG_RANGE = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A sweep's runs side by side, best first.

    Attributes:
        document: HTML page.
        table_csv: Status, all settings and all metrics as CSV, in the same order.
        heads: Columns of the short table: settings that differ, then the most telling metrics.
        rows: Its rows as text.
    """

    document: str
    table_csv: str
    heads: list[str]
    rows: list[list[str]]


def comparison(cells: Sequence[StageRun], name: str) -> Comparison:
    """Compare the runs of the sweep called ``name``; those without figures come last."""
    points = read_points(cells)
    settings = [_settings(cell, with_seed=bool(points)) for cell in cells]
    names = list(dict.fromkeys(key_ for one in settings for key_ in one))
    varied = [n for n in names if len({one.get(n) for one in settings}) > 1] or names
    if points:
        varied = [*(n for n in varied if n != "seed"), "seed"]
    metrics = sorted({metric for cell in cells for metric in cell.metrics}, key=_rank)
    shown = frontier_columns(cells) if points else _columns(cells, metrics)
    order = sorted(range(len(cells)), key=lambda index: _order(cells[index], shown))
    cells, settings = [cells[i] for i in order], [settings[i] for i in order]
    rows = [_row(*pair, varied, shown) for pair in zip(cells, settings, strict=True)]
    heads = [*(varied or ["run"]), *shown]
    if any(cell.status != "finished" for cell in cells):
        heads.append("status")
        rows = [[*row, _both(c.status)] for row, c in zip(rows, cells, strict=True)]
    best = shown[0] if shown and not points else ""
    markup = [[html for _, html in row] for row in rows]
    parts = [
        frontier(points),
        radius_section(points),
        comparison_of_methods(cells),
        section(
            "Comparison",
            _lead(cells, best),
            table(
                [LABELS.get(head, head) if points else head for head in heads],
                markup,
                text_columns=len(varied) or 1,
            ),
        ),
        "" if points else _plots(cells, settings, varied, shown),
        _origin(cells),
    ]
    lead = "Models of one sweep, side by side." if points else "Runs of one sweep, side by side."
    foot = "Written by lipllm report."
    return Comparison(
        document=page(f"lipllm sweep: {name}", lead, "\n".join(filter(None, parts)), foot),
        table_csv=_csv(cells, settings, names, metrics),
        heads=heads,
        rows=[[plain for plain, _ in row] for row in rows],
    )


def _row(
    cell: StageRun, settings: Mapping[str, str], varied: Sequence[str], shown: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the cells of a table's row as plain text and as HTML."""
    texts = [settings.get(n, "default") for n in varied] or [cell.directory.name]
    found = constants(cell)
    return [*map(_both, texts), *(_figure(cell, metric, found) for metric in shown)]


def _figure(cell: StageRun, metric: str, found: Mapping[str, float]) -> tuple[str, str]:
    """Return a figure as plain text and as HTML; a power of ten where only that is known."""
    name = metric.removeprefix("cert/")
    value = cell.summary.get(SECONDS) if metric == SECONDS else cell.metrics.get(metric)
    value = found.get(name, value)
    log10 = found.get(f"log10_{name}")
    if value is None and log10 is not None:
        return f"1e{log10:.1f}", f"10<sup>{log10:.1f}</sup>"
    return "" if value is None else f"{value:.6g}", number(value, 4)


def _both(text: str) -> tuple[str, str]:
    return text, escape(text)


def _lead(cells: Sequence[StageRun], best: str) -> str:
    failed = sum(cell.status.startswith("failed") for cell in cells)
    left = sum(cell.status == "unfinished" for cell in cells)
    parts = [f"{len(cells)} runs", f"best {best} first".replace("  ", " ")]
    parts += [f"{failed} failed" if failed else "", f"{left} unfinished" if left else ""]
    return ", ".join(filter(None, parts)) + "."


def _settings(cell: StageRun, *, with_seed: bool) -> dict[str, str]:
    pairs = (text.lstrip("+").partition("=") for text in cell.overrides)
    settings = {name: value for name, _, value in pairs}
    seed = (cell.record.get("config") or {}).get("seed")
    return {"seed": str(seed), **settings} if with_seed and seed is not None else settings


def _rank(metric: str) -> tuple[int, str]:
    return (_FIRST.index(metric) if metric in _FIRST else len(_FIRST), metric)


def _columns(cells: Sequence[StageRun], metrics: Sequence[str]) -> list[str]:
    """Choose metrics that differ between runs, the most telling first."""
    if _PRUNING[0] in metrics and all(metric.startswith("compress/") for metric in metrics):
        return [metric for metric in _PRUNING if metric in metrics]
    differing = [m for m in metrics if len({cell.metrics.get(m) for cell in cells}) > 1]
    return (differing or list(metrics))[:_MOST_COLUMNS]


def _order(cell: StageRun, shown: Sequence[str]) -> float:
    objective = cell.record.get("objective")
    if isinstance(objective, int | float) and math.isfinite(objective):
        return float(objective)
    return cell.metrics.get(shown[0], math.inf) if shown else math.inf


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _plots(
    cells: Sequence[StageRun],
    settings: Sequence[Mapping[str, str]],
    varied: Sequence[str],
    shown: Sequence[str],
) -> str:
    charts = []
    for name in varied:
        positions = [_number(one.get(name)) for one in settings]
        if len({p for p in positions if p is not None}) < 2 or not shown:
            continue
        others = [n for n in varied if n != name]
        known = [position for position in positions if position is not None]
        log_x = min(known) > 0 and max(known) >= _LOG_RANGE * min(known)
        for metric in _drawn(shown):
            series = _lines(cells, settings, positions, others, metric)
            caption = (
                f"<b>{escape(metric)}</b> over <b>{escape(name)}</b>. {kind(_kind(metric))} "
                f"{escape(METRICS.get(metric, 'Metric of each run'))}; one point per run."
            )
            markup = key(series) if len(series) > 1 else ""
            charts.append(figure(markup + line_chart(series, name, metric, log_x=log_x), caption))
    return section("Plots", "Settings that are numbers.", figures(*charts)) if charts else ""


def _drawn(shown: Sequence[str]) -> Sequence[str]:
    """Return the metrics worth a plot: of pruning all that are no sizes, else the first."""
    is_pruning = shown[0] == _PRUNING[0] and len(shown) > 1
    return [metric for metric in shown if metric in _PRUNING[:-2]] if is_pruning else shown[:1]


def _kind(metric: str) -> str:
    if metric.endswith(("naive", "tightened", "certified_deviation")):
        return "proved"
    return "estimate" if "attack" in metric or "reference" in metric else "measured"


def _lines(
    cells: Sequence[StageRun],
    settings: Sequence[Mapping[str, str]],
    positions: Sequence[float | None],
    others: Sequence[str],
    metric: str,
) -> list[Series]:
    """Return one line per combination of the other settings, or one for all if too many."""
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for cell, one, position in zip(cells, settings, positions, strict=True):
        label = ", ".join(f"{n}={one.get(n, 'default')}" for n in others) or "runs"
        if position is not None:
            groups.setdefault(label, []).append((position, cell.metrics.get(metric)))
    if len(groups) > _MOST_LINES:
        groups = {"runs": [point for points in groups.values() for point in points]}
    lines = []
    for (label, points), tone in zip(groups.items(), SERIES_TONES, strict=False):
        points.sort(key=lambda point: point[0])
        x, y = [x for x, _ in points], [y for _, y in points]
        lines.append(Series(label=label, x=x, y=y, tone=tone, markers=True))
    return lines


def _origin(cells: Sequence[StageRun]) -> str:
    rows = [
        [
            code(cell.directory.name),
            code(cell.command_line),
            escape(cell.status),
            number(cell.summary.get("seconds")),
        ]
        for cell in cells
    ]
    heads = ["Folder", "Command", "Status", "seconds"]
    return section("Runs", "", table(heads, rows, text_columns=3))


def _csv(
    cells: Sequence[StageRun],
    settings: Sequence[Mapping[str, str]],
    names: Sequence[str],
    metrics: Sequence[str],
) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "status", *names, *metrics])
    for cell, one in zip(cells, settings, strict=True):
        values = [cell.metrics.get(metric, "") for metric in metrics]
        texts = [one.get(n, "") for n in names]
        writer.writerow([cell.directory.name, cell.status, *texts, *values])
    return buffer.getvalue()
