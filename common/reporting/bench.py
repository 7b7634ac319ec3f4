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
        "query": "question",
        "policy": "policy",
        "summary_tokens": "mean tokens",
        "budget": "budget",
        "kept_fraction": "kept",
        "exact": "exact",
    },
    "speed": {
        "policy": "policy",
        "context": "context",
        "batch": "batch",
        "summary_tokens": "mean tokens",
        "budget": "budget",
        "tokens_per_s": "token/s",
        "ratio": "times full",
        "ratio_low": "lowest",
        "ratio_high": "highest",
        "cached": "cached tokens",
        "kv_bytes": "KV bytes",
        "device": "device",
        "clock": "clock",
    },
    "baseline": {
        "batch": "batch",
        "tokens_per_s": "token/s",
        "tokens_per_s_transformers": "transformers token/s",
        "ratio": "times transformers",
        "ratio_low": "lowest",
        "ratio_high": "highest",
        "device": "device",
        "clock": "clock",
    },
}
_COMBINED = {
    "policy": "policy",
    "summary_tokens": "mean tokens",
    "budget": "budget",
    "kl_vs_full": "KL, nats",
    "perplexity": "perplexity",
    "exact known": "exact, question known",
    "exact late": "exact, question late",
}
COMBINED = "policies"
PARTS = (*_FIELDS, COMBINED)
"""Tables: one per part of the bench, and one with all figures of each policy and budget."""
_TEXTS = frozenset({"policy", "task", "query"})


def text_table(rows: Sequence[Row], part: str) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of one table as text; columns without a value are left out.

    Policies are sorted best first within a budget; what was measured in turns stays together.
    """
    names, chosen = _content(rows, part)
    return list(names.values()), [[_text(row.get(name)) for name in names] for row in chosen]


def note(rows: Sequence[Row]) -> str:
    """Return the sentence that says how speeds were measured; empty where none were."""
    clocks = "; ".join(dict.fromkeys(_clock(row) for row in rows if "clock" in row))
    if not clocks:
        return ""
    return f"Speeds: medians of rounds in turns with the full cache or transformers ({clocks})."


def bench(story: Story) -> str:
    """Return the section with the figures of a bench."""
    run = story.stage(COMMAND)
    content = run.json("bench.json") if run else None
    title = "Cache policies"
    lead = "Every policy at the same budgets, on the same tokens, questions and machine."
    if not isinstance(content, dict) or not content.get("rows"):
        return section(title, lead, missing("No rows: the bench has not finished."))
    rows = content["rows"]
    tables = [details(part, markup) for part in PARTS if (markup := _table(rows, part))]
    again = f'<p class="note">Again: {code(run.command_line if run else "")}</p>'
    clock = f'<p class="note">{escape(note(rows))}</p>' if note(rows) else ""
    return section(title, lead, again, figures(*_charts(rows)), *tables, clock)


def _content(rows: Sequence[Row], part: str) -> tuple[dict[str, str], list[Row]]:
    """Return the columns (field to heading) and the rows of a table."""
    if part == COMBINED:
        fields, chosen = _combined(rows)
    else:
        fields, chosen = _FIELDS[part], [row for row in rows if row["part"] == part]
    if part in ("quality", COMBINED):
        chosen.sort(key=_standing)
    if part == "tasks":
        chosen.sort(key=lambda r: (r.get("query", ""), r.get("budget", 1.0), -r["exact"]))
    if part == "speed":
        shape = ("context", "batch", "device", "clock")
        chosen.sort(key=lambda r: (*(r[name] for name in shape), r.get("budget", 1.0), -r["ratio"]))
    shown = {name: head for name, head in fields.items() if any(_has(r, name) for r in chosen)}
    return shown, chosen


def _standing(row: Row) -> tuple[float, ...]:
    """Return what rows with quality are sorted by; where there is none, exact answers decide."""
    exact = [-row.get(f"exact {query}", 0.0) for query in ("late", "known")]
    return (row.get("budget", 1.0), row.get("kl_vs_full", 0.0), *exact)


def _has(row: Row, name: str) -> bool:
    return row.get(name) is not None


def _combined(rows: Sequence[Row]) -> tuple[dict[str, str], list[Row]]:
    """Return all figures of each policy, number of mean tokens and budget in one row."""
    parts = {row["part"] for row in rows} & {"quality", "tasks", "speed"}
    clocks = {_clock(row) for row in rows if row["part"] == "speed"}
    fields, found = dict(_COMBINED), dict[tuple[Any, ...], dict[str, Any]]()
    for row in rows if len(parts) > 1 else ():
        if row["part"] not in parts:
            continue
        share = None if row["policy"] == "full" else row["budget"]
        own = {"policy": row["policy"], "summary_tokens": row.get("summary_tokens")}
        entry = found.setdefault((*own.values(), share), own | ({"budget": share} if share else {}))
        if row["part"] == "quality":
            entry["perplexity"] = 2 ** row["bits_per_token"]
            entry |= {name: row[name] for name in ("kl_vs_full",) if name in row}
        elif row["part"] == "tasks":
            queries = [row["query"]] if "query" in row else ["known", "late"]
            entry |= {f"exact {query}": row["exact"] for query in queries}
        else:
            shape = f"{row['context']} x {row['batch']}"
            shape += f" ({_clock(row)})" if len(clocks) > 1 else ""
            for name, head in (("tokens_per_s", "token/s"), ("ratio", "times full")):
                fields[f"{name} {shape}"] = f"{head}, {shape}"
                entry[f"{name} {shape}"] = row[name]
    return fields, list(found.values())


def _clock(row: Row) -> str:
    return f"{row['device']}, {row['clock']} seconds"


def _table(rows: Sequence[Row], part: str) -> str:
    """Return a table as HTML, empty where it has no rows."""
    names, chosen = _content(rows, part)
    if not chosen:
        return ""
    heads, lines = text_table(rows, part)
    cells = [[escape(cell) for cell in line] for line in lines]
    return table(heads, cells, text_columns=len(_TEXTS & names.keys()))


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


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return str(value)
