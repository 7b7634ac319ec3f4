"""Robustness: accuracy that is proved and accuracy that attacks leave, against the radius."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.charts import TONES, Series, key, render
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

ROBUSTNESS_FILE = "robustness.json"

_TITLE = "Robustness"
_LEAD = "How much of the accuracy is left when inputs are perturbed, and how much is proved to be."
_SHARES = (1, 5, 10, 25)
_NORMS = {"l2": "l2", "linf": "largest coordinate"}
_DOMAINS = {"ball": "in the certified ball", "space": "anywhere", "input": "input"}


def robustness(story: Story) -> str:
    """Return certified and attacked accuracy; empty for a story without the attack command."""
    if "attack" not in story.stages:
        return ""
    stage = story.stage("attack")
    content = stage.json(ROBUSTNESS_FILE) if stage else None
    if not isinstance(content, dict):
        what = "No certified or attacked accuracy: run lipllm attack with data=NAME."
        return section(_TITLE, _LEAD, missing(what))
    charts = [_chart(content, norm) for norm in _NORMS]
    note = f'<p class="note">{kind("proved")} {escape(content["statement"])}</p>'
    parts = [note, figures(*filter(None, charts)), _shares(content), _swaps(content)]
    return section(_TITLE, _LEAD, *parts, _points(content["points"]))


def _chart(content: Mapping[str, Any], norm: str) -> str:
    points = [p for p in content["points"] if p["norm"] == norm]
    if not points:
        return ""
    is_text = content["kind"] == "transformer"
    series = [_certified(content, norm, str(p["domain"])) for p in _first_of(points, "domain")]
    for first in _first_of(points, "domain"):
        own = sorted((p for p in points if p["domain"] == first["domain"]), key=_label)
        where = f", {_DOMAINS[first['domain']]}" if is_text else ""
        x = [_label(p) for p in own]
        for field, name, tone in (("pgd_acc", "PGD", "measured"), ("fgsm_acc", "FGSM", "neutral")):
            y = [p[field] for p in own]
            line = Series(label=name + where, x=x, y=y, tone=tone, dashed=field == "fgsm_acc")
            series.append(line)
    what = "each embedding, share of the median row distance" if is_text else "pixels in [0, 1]"
    draw = _draw([one for one in series if one is not None], f"radius: {_NORMS[norm]}, {what}")
    caption = (
        f"<b>Accuracy under perturbations, {_NORMS[norm]}.</b> {kind('proved')} Solid blue: right "
        f"and certified, on {content['inputs']:,} inputs. {kind('measured')} Orange: what is left "
        f"after the best attack, on {points[0]['inputs']:,} inputs, of which the table has both: "
        "the true robust accuracy lies between them. Without perturbation "
        f"{percent(content['accuracy'])}."
    )
    shown = [one for one in series if one is not None]
    label = f"certified and attacked accuracy against the {norm} radius"
    return figure(key(shown) + render(draw, label, title="accuracy, share"), caption)


def _certified(content: Mapping[str, Any], norm: str, domain: str) -> Series | None:
    curves = [c for c in content["curves"] if c["domain"] == domain]
    # Of text one curve serves both norms: the attacked cubes lie inside the balls.
    own = next((c for c in curves if c["norm"] == norm), curves[0] if curves else None)
    if own is None:
        return None
    unit = float(content["unit"]) or 1.0
    kept = [(r / unit, y) for r, y in zip(own["radius"], own["accuracy"], strict=True) if r > 0]
    tone = "proved" if domain != "space" else "naive"
    label = "certified" + (f", {_DOMAINS[domain]}" if domain != "input" else "")
    return Series(label=label, x=[r for r, _ in kept], y=[y for _, y in kept], tone=tone)


def _draw(series: Sequence[Series], x_label: str) -> Any:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def draw(axes: Any) -> None:
        for one in series:
            axes.plot(
                one.x,
                one.y,
                color=TONES[one.tone],
                linewidth=1.8,
                linestyle=(0, (4, 2)) if one.dashed else "-",
                marker="o" if one.tone in ("measured", "neutral") else None,
                markersize=4,
                clip_on=False,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)

    return draw


def _shares(content: Mapping[str, Any]) -> str:
    found = content.get("figures") or {}
    rows = []
    for label, where in (("inside the certified ball", ""), ("in any direction", "space_")):
        values = [found.get(f"certified_top1_{where}{share}") for share in _SHARES]
        if any(value is not None for value in values):
            rows.append([escape(label), *map(percent, values)])
    if not rows:
        return ""
    heads = ["Most probable token proved to stay", *(f"within {share} %" for share in _SHARES)]
    return table(heads, rows)


def _swaps(content: Mapping[str, Any]) -> str:
    rows = [
        [
            " and ".join(f"<code>{escape(repr(t))}</code>" for t in s.get("text", s["ids"])),
            number(s["distance"]),
            percent(s["certified_share"]),
        ]
        for s in (content.get("swaps") or [])[:5]
    ]
    heads = ["Closest tokens", "distance, l2", "positions where exchanging them is proved harmless"]
    return table(heads, rows) if rows else ""


def _points(points: Sequence[Mapping[str, Any]]) -> str:
    heads = ["Norm", "Perturbed inputs", "radius", "clean", "certified", "PGD", "FGSM"]
    heads += ["top-1 certified", "top-1 under PGD"]
    fields = ("clean_acc", "certified_acc", "pgd_acc", "fgsm_acc", "certified_top1", "pgd_top1")
    rows = [
        [
            escape(_NORMS.get(p["norm"], p["norm"])),
            escape(_DOMAINS.get(p["domain"], p["domain"])),
            number(p["epsilon"]),
            *(percent(p[field]) for field in fields),
        ]
        for p in points
    ]
    return table(heads, rows, text_columns=2) if rows else ""


def _first_of(points: Sequence[Mapping[str, Any]], field: str) -> list[Mapping[str, Any]]:
    return list({p[field]: p for p in reversed(points)}.values())[::-1]


def _label(point: Mapping[str, Any]) -> float:
    return float(point["label"])
