"""Serving: cache budget against quality, and text under both caches."""

from collections.abc import Callable, Mapping
from typing import Any

from common.reporting.charts import SERIES_TONES, Series, key, line_chart
from common.reporting.page import (
    escape,
    figure,
    figures,
    kind,
    missing,
    number,
    percent,
    section,
    table,
)
from common.reporting.runs import Story

_BUDGET = "budget, tokens per head, and share kept"


def cache(story: Story) -> str:
    """Return cache budget against quality, by policy."""
    title = "Key-value cache"
    lead = "What a smaller cache costs, policy by policy, against the full cache."
    points = story.items("generate", "kv_frontier.json")
    if not points:
        return section(title, lead, missing("No cache figures: generate has not finished."))
    points = sorted(points, key=lambda point: (str(point["policy"]), point.get("budget") or 0))
    charts = [chart for chart in (_divergence(points), _deviation(points)) if chart]
    return section(title, lead, figures(*charts) if charts else "", _cache_table(points))


def _divergence(points: list[dict[str, Any]]) -> str:
    series = _by_policy(points, "kl_vs_full")
    if not series:
        return ""
    caption = (
        f"<b>Next-token distribution.</b> {kind('measured')} KL divergence from the full cache at "
        "the same positions; lower is closer. Below each budget: the share of the full cache's "
        "entries that are kept."
    )
    values = [value for one in series for value in one.y if value]
    log_y = len(values) > 0 and max(values) > 30 * min(values)
    label = "KL divergence, nats" + (", log scale" if log_y else "")
    chart = line_chart(series, _BUDGET, label, log_y=log_y, ticks=_ticks(points))
    return figure(key(series) + chart, caption)


def _deviation(points: list[dict[str, Any]]) -> str:
    proved = _by_policy(points, "certified_deviation", ", certified")
    series = proved + _by_policy(points, "measured_deviation", ", measured", dashed=True)
    if not series:
        return ""
    caption = (
        f"<b>Deviation of the logits</b>, largest RMS over the vocabulary. {kind('proved')} Solid: "
        f"computed from the evicted entries and the certificate. {kind('measured')} Dashed: seen "
        "in the same run."
    )
    chart = line_chart(
        series, _BUDGET, "RMS of the logits, log scale", log_y=True, ticks=_ticks(points)
    )
    return figure(key(series) + chart, caption)


def _budgets(points: list[dict[str, Any]]) -> list[float]:
    return sorted({point["budget"] for point in _compressed(points)})


def _compressed(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [p for p in points if p["policy"] != "full" and p.get("budget") is not None]


def _ticks(points: list[dict[str, Any]]) -> list[str]:
    labels = []
    for budget in _budgets(points):
        kept = [p.get("kept_fraction") for p in _compressed(points) if p["budget"] == budget]
        shares = [100 * share for share in kept if share is not None]
        low, high = min(shares, default=0.0), max(shares, default=0.0)
        text = f"{low:.0f} %" if high - low < 1 else f"{low:.0f} to {high:.0f} %"
        labels.append(f"{budget:g}\n{text}" if shares else f"{budget:g}")
    return labels


def _by_policy(
    points: list[dict[str, Any]], field: str, suffix: str = "", *, dashed: bool = False
) -> list[Series]:
    budgets = _budgets(points)
    names = dict.fromkeys(str(p["policy"]) for p in _compressed(points))
    series = []
    for name, tone in zip(names, SERIES_TONES, strict=False):
        own = [p for p in _compressed(points) if str(p["policy"]) == name]
        own = sorted((p for p in own if p.get(field) is not None), key=lambda p: p["budget"])
        x, y = [float(budgets.index(p["budget"])) for p in own], [p[field] for p in own]
        if x:
            label = f"{name}{suffix}"
            series.append(Series(label=label, x=x, y=y, tone=tone, dashed=dashed, markers=True))
    return series


def _cache_table(points: list[dict[str, Any]]) -> str:
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("budget", "budget", number),
        ("kept", "kept_fraction", percent),
        ("KL, nats", "kl_vs_full", number),
        ("measured deviation", "measured_deviation", number),
        ("certified deviation", "certified_deviation", number),
        ("same top token", "top1_agreement", percent),
        ("proved same", "certified_top1", percent),
        ("tokens/s", "tokens_per_s", number),
    ]
    used = [column for column in columns if any(p.get(column[1]) is not None for p in points)]
    rows = [
        [escape(point.get("policy")), *(show(point.get(name)) for _, name, show in used)]
        for point in points
    ]
    return table(["Policy", *(head for head, _, _ in used)], rows)


def samples(story: Story, limit: int) -> str:
    """Return text continued under the full and the compressed cache, side by side."""
    title = "Samples"
    lead = "The pruned model continues the same prompts with the full and the compressed cache."
    items = story.items("generate", "samples.json")
    if not items:
        return section(title, lead, missing("No samples: generate has not finished."))
    return section(title, lead, *(_sample(item) for item in items[:limit]))


def _sample(item: Mapping[str, Any]) -> str:
    prompt, full, small = (str(item.get(name, "")) for name in ("prompt", "full", "compressed"))
    note = "the same tokens" if full == small else "the text differs"
    cells = [("Full cache", full), (f"Compressed cache ({note})", small)]
    start = f'<span class="prompt">{escape(prompt)}</span>'
    parts = "".join(
        f"<div><h3>{escape(name)}</h3><pre>{start}{escape(text.removeprefix(prompt))}</pre></div>"
        for name, text in cells
    )
    return f'<div class="sample">{parts}</div>'
