"""Unlearning: the class and the rest before and after, how firmly it is forgotten, what moved."""

from collections.abc import Mapping
from typing import Any

from common.reporting.charts import Series, bar_chart, key, line_chart
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

_TONES = {"before": "neutral", "after": "measured", "retrained": "second"}
_LABELS = {"before": "before", "after": "unlearned", "retrained": "retrained without the class"}
_PARTS = {
    "forget": "class",
    "retain": "rest",
}
_SPLITS = {"train": "trained on", "held": "held out"}
_KINDS = {"acc": "accuracy", "bits_per_byte": "bits per byte"}


def unlearning(story: Story) -> str:
    """Return what a run of ``unlearn`` measured, drawn and as a table."""
    title = "Unlearning"
    lead = "What the model knew of the class and of the rest, and what it knows now, at its output."
    run = story.stage("unlearn")
    content = run.json("unlearning.json") if run else None
    if run is None or not isinstance(content, dict):
        return section(title, lead, missing("No unlearning.json: the unlearn stage left none."))
    found = {when: content[when] for when in _LABELS if content.get(when)}
    parts = (_knowledge(found), _relearning(found), _membership(found), _maps(content))
    return section(
        title,
        lead,
        f'<p class="note">{code(run.command_line)}</p>',
        figures(*filter(None, parts)),
        _table(found, content),
        _notes(run),
    )


def _knowledge(found: Mapping[str, Any]) -> str:
    names = list(found["before"]["figures"])
    series = [
        Series(
            label=_LABELS[when], y=[one["figures"].get(name) for name in names], tone=_TONES[when]
        )
        for when, one in found.items()
    ]
    groups = [_part(name).replace(", ", "\n") for name in names]
    what = _measure(names[0])
    caption = (
        f"<b>Forgotten and kept.</b> {kind('measured')} {escape(what.capitalize())} on the class "
        "and on everything else, on what was trained on and on what was held out. Forgetting is "
        "seen at the output; it is not erasure."
    )
    return figure(key(series) + bar_chart(groups, series, what), caption)


def _relearning(found: Mapping[str, Any]) -> str:
    curves = {"retain_curve": ("on the rest", True), "forget_curve": ("on the class", False)}
    series = [
        Series(
            label=f"{_LABELS[when]}, trained {label}",
            x=list(range(len(one["relearning"][name]))),
            y=one["relearning"][name],
            tone=_TONES[when],
            dashed=is_dashed,
        )
        for when, one in found.items()
        for name, (label, is_dashed) in curves.items()
        if (one.get("relearning") or {}).get(name)
    ]
    if not series:
        return ""
    goal = found["after"]["relearning"].get("goal")
    level = None if goal is None else ("half of it is back", goal)
    what = _measure(next(iter(found["before"]["figures"])))
    chart = line_chart(
        series, "steps of fine-tuning", f"{what} of the class, held out", level=level
    )
    caption = (
        f"<b>Relearning.</b> {kind('measured')} What fine-tuning brings back of the class, on "
        "everything else (dashed) and on a few samples of the class; curves end where half is "
        "back. The sooner, the less was erased."
    )
    return figure(key(series) + chart, caption)


def _membership(found: Mapping[str, Any]) -> str:
    attacks = {when: one["membership"] for when, one in found.items() if one.get("membership")}
    if not attacks:
        return ""
    groups = [_LABELS[when].replace(" without", "\nwithout") for when in attacks]
    series = [Series(label="attack", y=[one["auc"] for one in attacks.values()], tone="measured")]
    caption = (
        f"<b>Membership inference.</b> {kind('measured')} Chance that a sample of the class that "
        "was trained on has a lower loss than one that was not; 0.5 is guessing. Standard error "
        f"{number(max(one['error'] for one in attacks.values()), 2)}."
    )
    return figure(bar_chart(groups, series, "area under the curve"), caption)


def _maps(content: Mapping[str, Any]) -> str:
    maps = content.get("maps") or []
    if not maps:
        return ""
    series = [
        Series(label="change over old weights", y=[one["change"] for one in maps], tone="measured"),
        Series(
            label="norm after over before", y=[one["norm_growth"] for one in maps], tone="naive"
        ),
    ]
    chart = bar_chart([one["name"] for one in maps], series, "factor")
    caption = (
        f"<b>Edited maps.</b> {kind('measured')} Size of the change (Frobenius) and growth of the "
        "spectral norm; with a certificate the norm does not grow."
    )
    return figure(key(series) + chart, caption)


def _table(found: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    rows = []
    for name in found["before"]["figures"]:
        label = f"{_measure(name).capitalize()}, {_part(name)}"
        rows.append(
            _row(label, "measured", {w: one["figures"].get(name) for w, one in found.items()})
        )
    single = {
        "Membership inference, AUC": ("membership", "auc"),
        "Probe of the last hidden layer": ("probe", None),
        "Steps on the rest until half is back": ("relearning", "retain"),
        "Steps on the class until half is back": ("relearning", "forget"),
    }
    for label, (name, inner) in single.items():
        values = {w: one[name] for w, one in found.items() if one.get(name) is not None}
        if values:
            inside = {w: v[inner] if inner else v for w, v in values.items()}
            rows.append(_row(label, "measured", inside))
    naive = {when: content.get(f"naive_{when}") for when in ("before", "after")}
    if naive["before"] is not None:
        rows.append(_row("Bound from norms", "proved", naive))
    if content.get("certified_deviation") is not None:
        moved = {"after": content["certified_deviation"]}
        rows.append(_row("Certified change of the logits, RMS", "proved", moved))
    return table(["", "", *_LABELS.values()], rows, text_columns=2)


def _row(label: str, badge: str, values: Mapping[str, float | None]) -> list[str]:
    cells = ["" if when not in values else number(values[when]) for when in _LABELS]
    return [escape(label), kind(badge), *cells]


def _notes(run: StageRun) -> str:
    notes = run.summary.get("notes") or {}
    return definitions([(name.capitalize(), escape(text)) for name, text in notes.items()])


def _part(name: str) -> str:
    """Return the part of the data in a figure's name: ``class, held out``."""
    part, _, rest = name.partition("_")
    return f"{_PARTS[part]}, {_SPLITS[rest.rpartition('_')[2]]}"


def _measure(name: str) -> str:
    """Return what a figure's name says was measured."""
    return _KINDS[name.partition("_")[2].rpartition("_")[0]]
