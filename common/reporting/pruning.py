"""Pruning: sparsity against quality, deviation, certificate and speed."""

from collections.abc import Mapping
from typing import Any

from common.reporting.charts import Series, key, line_chart
from common.reporting.page import (
    code,
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
from common.reporting.places import compression, places
from common.reporting.runs import Story

_REMOVED = "parameters of the pruned places removed, %"
_DEVIATION = "largest RMS change of the logits over the vocabulary or the classes"
_QUALITY = {
    "val_bits_per_byte": (
        "bits per byte",
        "Validation loss of the really smaller model, before and after on the same text",
    ),
    "val_accuracy": (
        "accuracy",
        "Share of validation images that the really smaller model has right",
    ),
    "fidelity": (
        "output energy that is kept",
        "Mean over the places of the share of the output that the refit explains; there was no "
        "text to measure a loss on",
    ),
}
"""The first figure that points have: its axis, and what it is."""


def pruning(story: Story) -> str:
    """Return the frontier of sparsity against quality, deviation, certificate and speed."""
    title = "Pruning"
    lead = "What removing parameters costs in loss, how far it can move the output, what it saves."
    run = story.stage("compress")
    if run is None:
        return section(title, lead, missing("Nothing pruned: the compress stage has not finished."))
    points = story.items("compress", "frontier.json")
    points = sorted(points, key=lambda point: point["removed_fraction"])
    removed = [100 * point["removed_fraction"] for point in points]
    record = compression(story)
    charts = (_quality, _deviation, _certificate, _speed)
    return section(
        title,
        lead,
        f'<p class="note">{code(run.command_line)}</p>',
        figures(
            *(chart(story, points, removed) for chart in charts if points),
            *places(record),
        ),
        _frontier(points) if points else missing("No frontier: this run measured one budget."),
        _chosen(story, record),
    )


def _quality(story: Story, points: list[dict[str, Any]], removed: list[float]) -> str:
    found = (name for name in _QUALITY if any(point.get(name) is not None for point in points))
    name = next(found, None)
    if name is None:
        return ""
    label, what = _QUALITY[name]
    before = story.metric(f"compress/{name}_before")
    values = [point.get(name) for point in points]
    series = [Series(label="pruned model", x=removed, y=values, tone="measured", markers=True)]
    level = None if before is None else ("before pruning", before)
    chart = line_chart(series, _REMOVED, label, level=level)
    caption = f"<b>Quality.</b> {kind('measured')} {what}, without any training after pruning."
    return figure(key(series) + chart, caption)


def _deviation(_: Story, points: list[dict[str, Any]], removed: list[float]) -> str:
    names = {
        "certified_deviation": ("certified", {"tone": "proved"}),
        "semi_empirical_deviation": ("semi-empirical", {"tone": "neutral", "dashed": True}),
        "measured_deviation": ("measured", {"tone": "measured"}),
    }
    series = [
        Series(label=label, x=removed, y=[p.get(name) for p in points], markers=True, **style)  # type: ignore[arg-type]
        for name, (label, style) in names.items()
        if any(point.get(name) is not None for point in points)
    ]
    if not series:
        return ""
    caption = f"<b>Deviation from the dense model</b>, {_DEVIATION}. "
    if any(point.get("certified_deviation") is not None for point in points):
        caption += f"{kind('proved')} Certified: for every input, never below the measured one. "
    caption += f"{kind('measured')} Measured: on validation data."
    if len(series) > 2:
        caption += (
            f" {kind('estimate')} Semi-empirical: measured change of each block, amplified by the "
            "proved constants of the blocks after it."
        )
    chart = line_chart(series, _REMOVED, "RMS of the logits, log scale", log_y=True)
    return figure(key(series) + chart, caption)


def _certificate(_: Story, points: list[dict[str, Any]], removed: list[float]) -> str:
    values = [point.get("cert_tightened") for point in points]
    found = (point.get("cert_tightened_before") for point in points)
    before = next((value for value in found if value), None)
    if not any(value is not None for value in values):
        return ""
    level = None if before is None else ("before pruning", before)
    series = [Series(label="pruned model", x=removed, y=values, tone="proved", markers=True)]
    chart = line_chart(
        series, _REMOVED, "logits RMS per input RMS, log scale", log_y=True, level=level
    )
    caption = (
        f"<b>Certificate</b> of the pruned model, proved anew. {kind('proved')} The constant for "
        "every input of the domain, tightened by the solvers."
    )
    return figure(key(series) + chart, caption)


def _speed(_: Story, points: list[dict[str, Any]], removed: list[float]) -> str:
    saved = [1 / p["flops_fraction"] if p.get("flops_fraction") else None for p in points]
    columns = {
        "forward pass": ([p.get("forward_speedup") for p in points], {"tone": "measured"}),
        "decode step": ([p.get("decode_speedup") for p in points], {"tone": "third"}),
        "operations": (saved, {"tone": "neutral", "dashed": True}),
    }
    series = [
        Series(label=label, x=removed, y=y, markers=True, **style)  # type: ignore[arg-type]
        for label, (y, style) in columns.items()
        if any(value is not None for value in y)
    ]
    if not series:
        return ""
    caption = (
        f"<b>Speed.</b> {kind('measured')} Time before over after on this machine, medians of "
        f"pairs. {kind('estimate')} Dashed: the ratio of operations, counted from shapes."
    )
    return figure(key(series) + line_chart(series, _REMOVED, "times faster"), caption)


def _frontier(points: list[dict[str, Any]]) -> str:
    columns = [
        ("kept, MLP", "keep", number),
        ("kept, heads", "keep_heads", number),
        ("bits/byte", "val_bits_per_byte", _fine),
        ("accuracy", "val_accuracy", percent),
        ("fidelity", "fidelity", percent),
        ("KL, nats", "kl_nats", number),
        ("proved constant", "cert_tightened", _fine),
        ("certified change", "certified_deviation", number),
        ("measured change", "measured_deviation", number),
        ("forward", "forward_speedup", _times),
        ("decode", "decode_speedup", _times),
        ("operations", "flops_fraction", percent),
        ("parameters", "params_fraction", percent),
    ]
    shown = [column for column in columns if any(p.get(column[1]) is not None for p in points)]
    rows = [
        [
            escape(point.get("order", "")),
            *("" if p is None else show(p) for _, name, show in shown for p in [point.get(name)]),
        ]
        for point in points
    ]
    note = (
        f'<p class="note">{kind("proved")} certificate, certified change. {kind("measured")} '
        f"bits per byte, KL divergence, measured change, times. {kind('estimate')} operations.</p>"
    )
    return table(["Order", *(label for label, _, _ in shown)], rows) + note


def _chosen(story: Story, record: Mapping[str, Any]) -> str:
    rows = [
        ("Parameters", "compress/params", number, "measured"),
        ("Parameters before", "compress/params_before", number, "measured"),
        ("Weight file, of the dense one", "compress/bundle_bytes", percent, "measured"),
        ("MLP speed-up", "compress/mlp_speedup", _times, "measured"),
        ("Forward pass speed-up", "compress/forward_speedup", _times, "measured"),
        ("Decode step speed-up", "compress/decode_speedup", _times, "measured"),
        ("Operations, of the dense one", "compress/flops_fraction", percent, "estimate"),
        ("Bits per byte", "compress/val_bits_per_byte", _fine, "measured"),
        ("Bits per byte before", "compress/val_bits_per_byte_before", _fine, "measured"),
        ("Accuracy", "compress/val_accuracy", percent, "measured"),
        ("Accuracy before", "compress/val_accuracy_before", percent, "measured"),
        ("Output energy that is kept, mean over places", "compress/fidelity", percent, "measured"),
        ("KL divergence from the dense model, nats", "compress/kl_nats", number, "measured"),
        ("Most likely token unchanged", "compress/top1_agreement", percent, "measured"),
        ("Most likely token proved unchanged", "compress/certified_top1", percent, "proved"),
        ("Certified deviation, RMS", "compress/certified_deviation", number, "proved"),
        ("Measured deviation, RMS", "compress/measured_deviation", number, "measured"),
        ("Bound of the pruned model", "compress/cert/tightened", number, "proved"),
        ("Growth of the blocks' norms that the refit was allowed", "tau", _cap, "measured"),
    ]
    stage = story.stage("compress")
    values: dict[str, Any] = dict(stage.metrics) if stage else {}
    bound = story.metric("cert/tightened", "recertify")
    values["compress/cert/tightened"] = values.get("compress/tightened") if bound is None else bound
    values["tau"] = record.get("tau")
    shown = [
        [label, kind(badge), show(values[name])]
        for label, name, show, badge in rows
        if values.get(name) is not None
    ]
    return table(["The pruned model in the bundle", "", "value"], shown, text_columns=2)


def _fine(value: float) -> str:
    return number(value, 4)


def _cap(value: float | str) -> str:
    return "no cap" if value == "inf" else _times(float(value))


def _times(value: float) -> str:
    return f"{value:.2f}&nbsp;&times;"
