"""The tables of a bench: quality, retrieval and speed of cache policies."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.charts import SERIES_TONES, Series, key, line_chart
from common.reporting.page import (
    code,
    details,
    escape,
    figure,
    figures,
    kind,
    missing,
    section,
    table,
)
from common.reporting.runs import Story

COMMAND = "bench"
Row = Mapping[str, Any]

_FIELDS: dict[str, dict[str, str]] = {
    "quality": {
        "policy": "policy",
        "summary_tokens": "mean tokens",
        "budget": "budget",
        "kept_fraction": "kept",
        "kl_vs_full": "KL, nats",
        "bits_per_token": "bits/token",
        "top1_agreement": "same top token",
        "measured_deviation": "measured",
        "certified_deviation": "certified",
    },
    "tasks": {
        "task": "task",
        "policy": "policy",
        "summary_tokens": "mean tokens",
        "query": "question",
        "budget": "budget",
        "kept_fraction": "kept",
        "exact": "exact",
    },
    "speed": {
        "context": "context",
        "batch": "batch",
        "policy": "policy",
        "tokens_per_s": "token/s",
        "ratio": "times full",
        "ratio_low": "lowest",
        "ratio_high": "highest",
        "cached": "cached tokens",
        "kv_bytes": "KV bytes",
    },
    "baseline": {
        "batch": "batch",
        "tokens_per_s": "token/s",
        "tokens_per_s_transformers": "transformers token/s",
        "ratio": "times transformers",
        "ratio_low": "lowest",
        "ratio_high": "highest",
    },
}
HEADS = {part: list(fields.values()) for part, fields in _FIELDS.items()}
_TEXT_COLUMNS = {"quality": 1, "tasks": 4, "speed": 3, "baseline": 1}


def text_rows(rows: Sequence[Row], part: str) -> list[list[str]]:
    """Return the rows of one part as text; quality and tasks best first within a budget."""
    chosen = [row for row in rows if row["part"] == part]
    if part == "quality":
        chosen.sort(key=lambda r: (r["budget"], r.get("kl_vs_full", 0.0)))
    if part == "tasks":
        chosen.sort(key=lambda r: (r.get("query", ""), r.get("budget", 1.0), -r["exact"]))
    return [[_text(row.get(name)) for name in _FIELDS[part]] for row in chosen]


def bench(story: Story) -> str:
    """Return the section with the figures of a bench."""
    run = story.stage(COMMAND)
    content = run.json("bench.json") if run else None
    title = "Cache policies"
    lead = "Every policy at the same budgets, on the same tokens, questions and machine."
    if not isinstance(content, dict) or not content.get("rows"):
        return section(title, lead, missing("No rows: the bench has not finished."))
    rows = content["rows"]
    tables = [
        details(part, table(HEADS[part], _escaped(rows, part), text_columns=_TEXT_COLUMNS[part]))
        for part in _FIELDS
        if any(row["part"] == part for row in rows)
    ]
    note = f'<p class="note">Again: {code(run.command_line if run else "")}</p>'
    return section(title, lead, note, figures(*_charts(rows)), *tables)


def _charts(rows: Sequence[Row]) -> list[str]:
    quality = [row for row in rows if row["part"] == "quality" and row["policy"] != "full"]
    charts = [
        _chart(
            quality,
            "kl_vs_full",
            "KL divergence, nats, log scale",
            f"<b>Next-token distribution.</b> {kind('measured')} Divergence from the full cache.",
            log_y=True,
        )
    ]
    for query, text in (("known", "before the cache is cut"), ("late", "after the cache was cut")):
        asked = [row for row in rows if row["part"] == "tasks" and row.get("query") == query]
        caption = f"<b>Exact answers</b>, question read {text}. {kind('measured')}"
        full = [r["exact"] for r in rows if r["part"] == "tasks" and r["policy"] == "full"]
        level = ("full cache", full[0]) if full else None
        charts.append(_chart(asked, "exact", "share of exact answers", caption, level=level))
    return [chart for chart in charts if chart]


def _chart(rows: Sequence[Row], field: str, label: str, caption: str, **style: Any) -> str:
    """Draw the best policies (each with its number of mean tokens) over the budget."""
    series = []
    for (policy, summary), tone in zip(_best(rows, field), SERIES_TONES, strict=False):
        own = sorted(
            (r for r in rows if (r["policy"], r.get("summary_tokens", 0)) == (policy, summary)),
            key=lambda row: row["budget"],
        )
        shown = [row for row in own if row.get(field) or not style.get("log_y")]
        if shown:
            x, y = [100 * row["budget"] for row in shown], [row[field] for row in shown]
            name = f"{policy} + {summary} mean" if summary else policy
            series.append(Series(label=name, x=x, y=y, tone=tone, markers=True))
    if not series:
        return ""
    return figure(key(series) + line_chart(series, "budget, % of tokens", label, **style), caption)


def _best(rows: Sequence[Row], field: str) -> list[tuple[str, int]]:
    """Return policies and mean tokens, best at the smallest budget first."""
    least = min((row["budget"] for row in rows), default=0.0)
    first = [row for row in rows if row["budget"] == least and row.get(field) is not None]
    first.sort(key=lambda row: row[field], reverse=field == "exact")
    return [(row["policy"], row.get("summary_tokens", 0)) for row in first]


def _escaped(rows: Sequence[Row], part: str) -> list[list[str]]:
    return [[escape(cell) for cell in line] for line in text_rows(rows, part)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)
