"""Pruning: sparsity against quality and deviation."""

from typing import Any

from common.reporting.charts import Series, key, line_chart
from common.reporting.page import figure, figures, kind, missing, number, percent, section, table
from common.reporting.runs import Story

_DEVIATION = "largest RMS change of the logits over the vocabulary"


def pruning(story: Story) -> str:
    """Return the frontier of sparsity against quality and deviation."""
    title = "Pruning"
    lead = "What removing parameters costs in loss, and how far it can move the output."
    points = story.items("compress", "frontier.json")
    if not points:
        return section(title, lead, missing("No frontier: the compress stage has not finished."))
    points = sorted(points, key=lambda point: point["removed_fraction"])
    removed = [100 * point["removed_fraction"] for point in points]
    return section(
        title,
        lead,
        figures(_quality(story, points, removed), _deviation(points, removed)),
        _chosen(story),
    )


def _quality(story: Story, points: list[dict[str, Any]], removed: list[float]) -> str:
    bits = [point.get("val_bits_per_byte") for point in points]
    before = story.metric("compress/val_bits_per_byte_before")
    series = [Series(label="pruned model", x=removed, y=bits, tone="measured", markers=True)]
    level = None if before is None else ("before pruning", before)
    chart = line_chart(series, "MLP parameters removed, %", "bits per byte", level=level)
    caption = (
        f"<b>Quality.</b> {kind('measured')} Validation loss of the really smaller model, before "
        "and after on the same text, without any training after pruning."
    )
    return figure(key(series) + chart, caption)


def _deviation(points: list[dict[str, Any]], removed: list[float]) -> str:
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
    caption = (
        f"<b>Deviation from the dense model</b>, {_DEVIATION}. {kind('proved')} Certified: for "
        f"every input. {kind('measured')} Measured: on validation text, never above it."
    )
    if len(series) > 2:
        caption += (
            f" {kind('estimate')} Semi-empirical: measured change of each block, amplified by the "
            "proved constants of the blocks after it."
        )
    chart = line_chart(
        series, "MLP parameters removed, %", "RMS of the logits, log scale", log_y=True
    )
    return figure(key(series) + chart, caption)


def _chosen(story: Story) -> str:
    rows = [
        ("Parameters", "compress/params", number, "measured"),
        ("Parameters before", "compress/params_before", number, "measured"),
        ("Weight file, of the dense one", "compress/bundle_bytes", percent, "measured"),
        ("MLP speed-up", "compress/mlp_speedup", _times, "measured"),
        ("Bits per byte", "compress/val_bits_per_byte", _fine, "measured"),
        ("Bits per byte before", "compress/val_bits_per_byte_before", _fine, "measured"),
        ("Most likely token unchanged", "compress/top1_agreement", percent, "measured"),
        ("Most likely token proved unchanged", "compress/certified_top1", percent, "proved"),
        ("Certified deviation, RMS", "compress/certified_deviation", number, "proved"),
        ("Measured deviation, RMS", "compress/measured_deviation", number, "measured"),
        ("Bound of the pruned model", "compress/cert/tightened", number, "proved"),
    ]
    stage = story.stage("compress")
    values = dict(stage.metrics) if stage else {}
    bound = story.metric("cert/tightened", "recertify")
    if bound is not None:
        values["compress/cert/tightened"] = bound
    shown = [
        [label, kind(badge), show(values[name])]
        for label, name, show, badge in rows
        if name in values
    ]
    return table(["The pruned model in the bundle", "", "value"], shown, text_columns=2)


def _fine(value: float) -> str:
    return number(value, 4)


def _times(value: float) -> str:
    return f"{value:.2f}&nbsp;&times;"
