"""Accuracy and loss of a sweep's models against what is proved about them, beside published rows.

The horizontal axis is always a proved constant of the run's own certificate: the tightened one
where it is stored, else the naive one. Published constants are drawn hollow and named as such.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from common.reporting.page import escape, figure, figures, kind, number, section, table
from common.reporting.proof import certificate
from common.reporting.published import NOTES, Published, published
from common.reporting.runs import StageRun
from common.reporting.scatter import MARKERS, Cloud, marker_key, scatter_chart

ACCURACY = "train/val_acc_full"
LOSS = "train/val_loss_nats"
SECONDS = "seconds"
LABELS = {
    ACCURACY: "accuracy",
    "train/val_acc_ref": "accuracy, reference protocol",
    LOSS: "loss, nats",
    "cert/reference": "reference formula",
    "cert/naive": "naive (proved)",
    "cert/tightened": "tightened (proved)",
}
"""Short names of the table's columns, for readers; files keep the declared ones."""

_FIGURES = (ACCURACY, "train/val_acc_ref", LOSS)
_CONSTANTS = ("reference", "naive", "tightened")

TONES = ("second", "third", "measured", "naive", "neutral", "proved")
_FRONT_WORDS = 6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One finished run with a proved constant.

    Attributes:
        cell: The run.
        optimizer: Update of the matrices, with the model where models differ.
        constraint: Kind of the weight constraint.
        accuracy: Validation accuracy, share.
        loss: Validation cross-entropy in nats, or None.
        log10_bound: Decimal logarithm of the proved constant.
        which: ``tightened`` or ``naive``.
    """

    cell: StageRun
    optimizer: str
    constraint: str
    accuracy: float
    loss: float | None
    log10_bound: float
    which: str


def frontier_columns(cells: Sequence[StageRun]) -> list[str]:
    """Return the metrics that the table of a frontier shows: those that any run has."""
    found = {name for cell in cells for name in constants(cell)}
    figures_ = [m for m in _FIGURES if any(m in cell.metrics for cell in cells)]
    return [*figures_, *(f"cert/{name}" for name in _CONSTANTS if name in found), SECONDS]


def pareto(values: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points with no other point as far left and as high, left to right.

    Args:
        values: Cost (smaller is better) and worth (larger is better); of equal points the first.
    """
    front: list[int] = []
    order = sorted(range(len(values)), key=lambda i: (values[i][0], -values[i][1], i))
    for index in order:
        if not front or values[index][1] > values[front[-1]][1]:
            front.append(index)
    return front


def read_points(cells: Sequence[StageRun]) -> list[Point]:
    """Return the finished runs of ``train`` that have an accuracy and a proved constant."""
    models = {_model(cell) for cell in cells}
    points = []
    for cell in cells:
        accuracy, bound = cell.metrics.get(ACCURACY), _bound(cell)
        if accuracy is None or bound is None:
            continue
        optimizer = _name(cell, "optim", "matrices")
        if len(models) > 1:
            optimizer += f", {_model(cell)}"
        points.append(
            Point(
                cell=cell,
                optimizer=optimizer,
                constraint=_name(cell, "constraint", "kind"),
                accuracy=accuracy,
                loss=cell.metrics.get(LOSS),
                log10_bound=bound[0],
                which=bound[1],
            )
        )
    return points


def frontier(points: Sequence[Point]) -> str:
    """Return the section with accuracy and loss against the certificate; empty without points."""
    if not points:
        return ""
    rows = published(_task(points))
    lead = (
        "What the models know against what is proved about them: an upper bound on how far the "
        "logits' RMS moves per RMS of the input. Up and left is better."
    )
    charts = [_chart(points, rows, "accuracy")]
    if any(point.loss is not None for point in points):
        charts.append(_chart(points, rows, "loss"))
    return section("Frontier", lead, figures(*charts), _published_table(rows))


def group(point: Point, points: Sequence[Point]) -> str:
    """Return what a point's colour stands for: its optimizer, or where all share one, its cap."""
    is_alone = len({other.optimizer for other in points}) == 1
    return point.constraint if is_alone else point.optimizer


def tones(points: Sequence[Point]) -> dict[str, str]:
    """Return a colour for every group of points."""
    names = list(dict.fromkeys(group(point, points) for point in points))
    return {name: TONES[index % len(TONES)] for index, name in enumerate(names)}


def front_of(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both accuracy and certificate."""
    return [points[i] for i in pareto([(p.log10_bound, p.accuracy) for p in points])]


def _chart(points: Sequence[Point], rows: Sequence[Published], field: str) -> str:
    kept = [point for point in points if getattr(point, field) is not None]
    sign = 1 if field == "accuracy" else -1
    values = [(p.log10_bound, float(getattr(p, field))) for p in kept]
    front = [values[i] for i in pareto([(x, sign * y) for x, y in values])]
    clouds = _clouds(kept, field)
    others = [row for row in rows if getattr(row, field) is not None]
    if others:
        note = NOTES[others[0].task]
        x, y = [row.log10_reference for row in others], [getattr(row, field) for row in others]
        clouds.append(Cloud(label=note, x=x, y=y, tone="muted", hollow=True))
    y_label = "validation accuracy" if sign > 0 else "validation cross-entropy, nats"
    x_label = "proved Lipschitz constant" + (" (hollow: published formula)" if others else "")
    chart = scatter_chart(clouds, front, x_label, y_label, _words(y_label, len(kept), front))
    best = "best at that constant or a smaller one"
    caption = f"<b>{escape(y_label.capitalize())}.</b> {kind('measured')} on held-out data. "
    caption += f"{kind('proved')} The constant of each model: {_which(kept)}. "
    caption += f"The staircase: {best}, of this sweep."
    if others:
        caption += f" {kind('estimate')} Hollow: {escape(NOTES[others[0].task])}."
    return figure(marker_key(clouds, best) + chart, caption)


def _clouds(points: Sequence[Point], field: str) -> list[Cloud]:
    colours = tones(points)
    shapes = dict(
        zip(dict.fromkeys(p.constraint for p in points), [*MARKERS] * len(points), strict=False)
    )
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.optimizer, point.constraint), []).append(point)
    return [
        Cloud(
            label=f"{optimizer}, {constraint}",
            x=[point.log10_bound for point in members],
            y=[float(getattr(point, field)) for point in members],
            tone=colours[group(members[0], points)],
            marker=shapes[constraint],
        )
        for (optimizer, constraint), members in groups.items()
    ]


def _words(y_label: str, count: int, front: Sequence[tuple[float, float]]) -> str:
    """Say in words what the staircase shows, at most a handful of its steps."""
    step = max(1, math.ceil(len(front) / _FRONT_WORDS))
    chosen = [*front[:-1][::step], front[-1]] if front else []
    steps = ", ".join(f"{y:.3f} at {_plain(x)}" for x, y in chosen)
    return f"{y_label} against the proved Lipschitz constant, {count} models; best: {steps}"


def _plain(log10: float) -> str:
    return f"{10**log10:.3g}" if abs(log10) < 6 else f"1e{log10:.1f}"


def _which(points: Sequence[Point]) -> str:
    names = {point.which for point in points}
    texts = {"tightened": "tightened by the solvers", "naive": "from operator norms"}
    if len(names) == 1:
        return texts[names.pop()]
    loose = sum(point.which == "naive" for point in points)
    return f"tightened by the solvers, of {loose} runs only from operator norms"


def _published_table(rows: Sequence[Published]) -> str:
    if not rows:
        return ""
    heads = ["Published, not proved", "Source", "accuracy", "loss, nats", "published formula"]
    cells = [
        [
            escape(row.name),
            escape(row.source),
            number(row.accuracy),
            number(row.loss, 4),
            number(10**row.log10_reference)
            if row.log10_reference < 100
            else f"10<sup>{row.log10_reference:g}</sup>",
        ]
        for row in rows
    ]
    note = f'<p class="note">{kind("estimate")} {escape(NOTES[rows[0].task])}.</p>'
    return table(heads, cells, text_columns=2) + note


def constants(cell: StageRun) -> dict[str, float]:
    """Return ``reference``, ``naive``, ``tightened`` and their ``log10_`` of a run, where known.

    The certificate in the run's bundle comes first (it may have been made later), then the run's
    metrics. A certificate without tightening has no ``tightened``.
    """
    stored = dict(certificate(cell.artifact("bundle")))
    if (stored.get("settings") or {}).get("tighten") is False:
        stored |= {"tightened": None, "log10_tightened": None}
    found: dict[str, float] = {}
    for name in _CONSTANTS:
        pairs = (
            (cell.metrics.get(f"cert/{name}"), cell.metrics.get(f"cert/log10_{name}")),
            (stored.get(name), stored.get(f"log10_{name}")),
        )
        for value, log10 in pairs:
            if isinstance(value, int | float) and 0 < value < math.inf:
                found |= {name: float(value), f"log10_{name}": math.log10(value)}
            elif isinstance(log10, int | float) and math.isfinite(log10):
                found |= {f"log10_{name}": float(log10)}
    return found


def _bound(cell: StageRun) -> tuple[float, str] | None:
    """Return the decimal logarithm of the best proved constant of a run, and which it is."""
    found = constants(cell)
    names = (name for name in ("tightened", "naive") if f"log10_{name}" in found)
    which = next(names, None)
    return None if which is None else (found[f"log10_{which}"], which)


def _name(cell: StageRun, group: str, field: str) -> str:
    settings = (cell.record.get("config") or {}).get(group)
    found = settings.get(field) if isinstance(settings, Mapping) else None
    return str(found or _setting(cell, group) or "unknown")


def _model(cell: StageRun) -> str:
    """Return what the command line says about the architecture: model, else experiment."""
    model, experiment = _setting(cell, "model"), _setting(cell, "experiment")
    return f"{model} model" if model else experiment or "default model"


def _setting(cell: StageRun, name: str) -> str | None:
    pairs = dict(text.lstrip("+").partition("=")[::2] for text in cell.overrides)
    return pairs.get(name)


def _task(points: Sequence[Point]) -> str | None:
    """Return the data set that all runs share."""
    data = [(p.cell.record.get("config") or {}).get("data") for p in points]
    names = {one.get("source") if isinstance(one, Mapping) else None for one in data}
    return names.pop() if len(names) == 1 else None
