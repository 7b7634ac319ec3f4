"""Runs of ``lipllm solve``: how the residual falls, and what each method paid for it."""

import csv
import io
import math
from collections.abc import Sequence

from common.reporting.charts import key
from common.reporting.convergence import Course, convergence_chart, series
from common.reporting.page import (
    code,
    definitions,
    escape,
    figure,
    figures,
    kind,
    missing,
    number,
    section,
    table,
)
from common.reporting.runs import StageRun, Story

COMMAND = "solve"
_OF_THE_PROBLEM = ("solve.problem", "solve.method", "solve.size")
_LEVELS = 3  # residuals at which methods are compared, beside the last one
_ALLOWS = "largest error that the residual allows, up to rounding"
_CAPTION = (
    f"{kind('measured')} Norm of an explicit element of F + G, the smallest up to each point. "
    "An oracle call is one component; an evaluation of the whole operator counts all of them."
)


def solving(story: Story) -> str:
    """Return the course of a single run and its figures; empty where nothing was solved."""
    run = story.stages.get(COMMAND)
    if run is None or not run.summary:
        return ""
    course = read_course(run)
    notes = run.summary.get("notes") or {}
    name, about = setting(run, "problem"), str(notes.get("problem", ""))
    method = str(notes.get("method") or setting(run, "method"))
    chart = (
        figures(figure(convergence_chart([course]), f"<b>{escape(method)}.</b> {_CAPTION}"))
        if course.calls
        else missing("No trace.csv: the course of the run cannot be drawn.")
    )
    return section(f"{name} by {method}", about, chart, _account(run))


def comparison_of_methods(cells: Sequence[StageRun]) -> str:
    """Return a chart and a table per problem of a sweep of solves; empty for other sweeps."""
    groups: dict[str, list[StageRun]] = {}
    for cell in cells:
        if cell.command == COMMAND and cell.summary:
            groups.setdefault(_instance(cell), []).append(cell)
    return "\n".join(_comparison(name, group) for name, group in groups.items())


def read_course(run: StageRun) -> Course:
    """Return the course that a run left in its trace, empty where it left none."""
    path = run.artifact("trace")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) if path else []
        calls, best = [float(row["calls"]) for row in rows], [float(row["best"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        calls, best = [], []
    return Course(label=setting(run, "method"), calls=calls, best=best)


def setting(run: StageRun, name: str) -> str:
    """Return a setting of a solve; the method of ``auto`` is not resolved."""
    config = run.record.get("config") or {}
    inner = config.get(COMMAND)
    value = inner.get(name) if isinstance(inner, dict) else None
    return str(config.get(name) if value is None else value)


def _instance(run: StageRun) -> str:
    """Return the problem with whatever changes its data."""
    config = run.record.get("config") or {}
    inner = config.get(COMMAND) or {}
    given = {"size": inner.get("size"), **(inner.get("problem_options") or {})}
    parts = [f"{name}={value}" for name, value in given.items() if value is not None]
    parts += [f"seed={config['seed']}"] if config.get("seed") else []
    return ", ".join([setting(run, "problem"), *parts])


def _account(run: StageRun) -> str:
    metrics = run.metrics
    rows = [
        ("status", escape((run.summary.get("notes") or {}).get("status", "unknown"))),
        ("residual", f"{number(metrics.get('solve/residual'))} {kind('measured')}"),
        ("error", f"{number(metrics.get('solve/error'))} {kind('measured')}"),
        (_ALLOWS, number(metrics.get("solve/error_allowed"))),
        ("evaluations of the whole operator", number(metrics.get("solve/full_evals"))),
        ("evaluations of single components", number(metrics.get("solve/component_evals"))),
        ("oracle calls in components", number(metrics.get("solve/evals"))),
        ("seconds", number(metrics.get("solve/seconds"))),
        ("command", code(run.command_line)),
    ]
    return definitions(rows)


def _comparison(name: str, cells: Sequence[StageRun]) -> str:
    labels = _labels(cells)
    courses = [
        Course(label=label, calls=course.calls, best=course.best)
        for label, course in zip(labels, map(read_course, cells), strict=True)
    ]
    levels = _levels(courses)
    order = sorted(range(len(cells)), key=lambda index: _order(cells[index], courses[index]))
    rows = [_row(labels[index], cells[index], courses[index], levels) for index in order]
    # In the order of the folders, so that a method keeps its colour from problem to problem.
    drawn = [course for course in courses if course.calls]
    heads = ["Method", "Status", *(f"calls to {level:.0e}" for level in levels)]
    heads += ["residual", "full", "component", "seconds"]
    parts = [table(heads, rows, text_columns=2)]
    if drawn:
        caption = f"<b>{escape(name)}.</b> {_CAPTION}"
        parts.insert(0, figures(figure(key(series(drawn)) + convergence_chart(drawn), caption)))
    return section(f"Methods on {name}", f"Fewest calls first. {_command(cells)}", *parts)


def _row(label: str, cell: StageRun, course: Course, levels: Sequence[float]) -> list[str]:
    metrics = cell.metrics
    status = str((cell.summary.get("notes") or {}).get("outcome", ""))
    figures_ = [number(metrics.get(f"solve/{name}")) for name in _COLUMNS]
    reached = [number(calls_to(course, level)) for level in levels]
    return [escape(label), escape(status), *reached, *figures_]


_COLUMNS = ("residual", "full_evals", "component_evals", "seconds")


def calls_to(course: Course, level: float) -> float | None:
    """Return the oracle calls after which the residual was at most ``level``, None if never."""
    pairs = zip(course.calls, course.best, strict=True)
    return next((calls for calls, best in pairs if best <= level), None)


def _levels(courses: Sequence[Course]) -> list[float]:
    """Return powers of ten between the first residual and the smallest that was reached."""
    ends = [course.best[-1] for course in courses if course.best and course.best[-1] > 0]
    starts = [course.best[0] for course in courses if course.best]
    if not ends or not max(starts) > 0:
        return []
    low, high = math.ceil(math.log10(min(ends)) - 1e-9), math.ceil(math.log10(max(starts)) - 1)
    if high < low:
        return []
    count = min(_LEVELS, high - low + 1)
    places = [high - round((high - low) * (turn + 1) / count) for turn in range(count)]
    return [10.0**place for place in dict.fromkeys(places)]


def _order(cell: StageRun, course: Course) -> tuple[bool, float]:
    objective = cell.record.get("objective")
    if isinstance(objective, int | float) and math.isfinite(objective):
        return False, float(objective)
    return True, course.best[-1] if course.best else math.inf


def _labels(cells: Sequence[StageRun]) -> list[str]:
    """Return the method of each run, and the other settings that differ."""
    given = [
        dict(text.lstrip("+").split("=", 1) for text in cell.overrides if "=" in text)
        for cell in cells
    ]
    names = list(dict.fromkeys(name for one in given for name in one))
    varied = [
        name
        for name in names
        if not name.startswith(("problem", "method", "seed", *_OF_THE_PROBLEM))
        and len({one.get(name) for one in given}) > 1
    ]
    return [
        " ".join(
            [
                setting(cell, "method"),
                *(f"{n.rpartition('.')[2]}={one[n]}" for n in varied if n in one),
            ]
        )
        for cell, one in zip(cells, given, strict=True)
    ]


def _command(cells: Sequence[StageRun]) -> str:
    """Return the sweep as it can be typed again, one value list per setting."""
    values: dict[str, list[str]] = {}
    for cell in cells:
        for text in cell.overrides:
            name, _, value = text.partition("=")
            values.setdefault(name, [])
            if value not in values[name]:
                values[name].append(value)
    settings = " ".join(f"{name}={','.join(found)}" for name, found in values.items())
    return f"Command: lipllm {COMMAND} {settings} -m"
