"""What a pruning left of every place, and what that cost there: from ``compression.json``."""

from collections.abc import Mapping
from typing import Any

from common.reporting.charts import Series, bar_chart, key
from common.reporting.page import figure, kind
from common.reporting.runs import Story, read_json

_LETTERS = {"heads": "A", "mlp": "M", "channels": "C"}


def compression(story: Story) -> dict[str, Any]:
    """Return the record of what the compress stage did; empty where there is none."""
    run = story.stage("compress")
    folders = [run.artifact(name) for name in ("bundle", "checkpoint")] if run else []
    found = (read_json(folder / "compression.json") for folder in folders if folder is not None)
    return next((content for content in found if isinstance(content, dict)), {})


def places(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the figures of kept shares and of errors, one bar per place; none without places."""
    layers = record.get("layers") or []
    if not layers:
        return ()
    names = [f"{_LETTERS.get(layer['kind'], '')}{layer['layer']}" for layer in layers]
    shares = [100 * layer["kept_components"] / layer["components"] for layer in layers]
    kept = Series(label="components that stay", y=shares, tone="second")
    letters = "A groups of heads, M neurons of the MLP, C channels, numbered by layer"
    caption = (
        f"<b>What stays</b> of each pruned place: {letters}. Counted in the model that was written."
        f" {kind('measured')}"
    )
    return (
        figure(key([kept]) + bar_chart(names, [kept], "components that stay, %"), caption),
        _errors(names, layers),
    )


def _errors(names: list[str], layers: list[dict[str, Any]]) -> str:
    series = [
        Series(label="calibration inputs", y=[100 * one["error"] for one in layers], tone="naive"),
        Series(label="held out", y=[100 * one["held_error"] for one in layers], tone="measured"),
    ]
    chart = bar_chart(names, series, "lost output energy, %")
    caption = (
        f"<b>What it cost there.</b> {kind('measured')} Mean squared error of the place's output "
        "after the refit over its mean square, on the inputs it was fitted on and on others."
    )
    return figure(key(series) + chart, caption)
