"""Calibration: how concentrated queries are before their rotation, by layer, head and band."""

from typing import Any

from common.reporting.charts import TONES, Series, key, line_chart, render
from common.reporting.page import (
    figure,
    figures,
    kind,
    missing,
    number,
    section,
    table,
)
from common.reporting.runs import Story

FILE = "concentration.json"
_TONE = "measured"
_CELL_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.12, 1.2, 6.0
_POINTS = 72  # per inch
_CONCENTRATED = 0.95  # the level that the paper counts heads by


def concentration(story: Story) -> str:
    """Return the resultant lengths of all heads, and over the bands."""
    title = "Query centres"
    lead = (
        "Before their rotation, the queries of a head point one way, or many ways. The resultant "
        "length says which: length of the mean over mean length, 1 for one direction, 0 for none. "
        "Where it is near 1, the centre foretells the queries to come."
    )
    run = story.stages.get("calibrate")
    content = None if run is None else run.json(FILE)
    if run is None or not isinstance(content, dict) or not content.get("layers"):
        return section(title, lead, missing("No query centres: calibrate has not finished."))
    parts = figures(_heads(content["layers"]), _bands(content["bands"]))
    return section(title, lead, parts, _totals(content, run.metrics))


def _heads(layers: list[dict[str, Any]]) -> str:
    """Return one square per layer and head; the fuller its colour, the more concentrated."""
    cells = [
        (layer["layer"], head, value)
        for layer in layers
        for head, value in enumerate(layer["mean"])
    ]
    columns = 1 + max(x for x, _, _ in cells)
    rows = 1 + max(y for _, y, _ in cells)
    width, height = (
        min(max(count * _CELL_INCHES + 0.8, _LEAST_INCHES), _MOST_INCHES)
        for count in (columns, rows)
    )

    def draw(axes: Any) -> None:
        side = 0.9 * _POINTS * min((width - 0.8) / columns, (height - 0.6) / rows)
        x, y, values = zip(*cells, strict=True)
        axes.scatter(
            x, y, s=side**2, marker="s", color=TONES[_TONE], alpha=_opacities(values), linewidths=0
        )
        axes.set_xlim(-0.7, columns - 0.3)
        axes.set_ylim(rows - 0.3, -0.7)
        axes.set_xlabel("layer")
        axes.set_ylabel("query head")

    values = sorted(value for _, _, value in cells)
    words = (
        f"mean resultant length of {len(cells)} heads: lowest {values[0]:.3g}, "
        f"median {values[len(values) // 2]:.3g}, highest {values[-1]:.3g}"
    )
    dominant = [value for layer in layers for value in layer["dominant"]]
    share = sum(value > _CONCENTRATED for value in dominant) / len(dominant)
    caption = (
        f"<b>By head.</b> {kind('measured')} Resultant length, mean over the bands; full colour is "
        f"1, none is 0. At the band with the largest mean modulus {100 * share:.3g} % of heads are "
        f"above {_CONCENTRATED}."
    )
    return figure(render(draw, words, size=(width, height)), caption)


def _opacities(values: tuple[float, ...]) -> list[float]:
    return [min(max(float(value), 0.0), 1.0) for value in values]


def _bands(rows: list[dict[str, float]]) -> str:
    if not rows:
        return ""
    places = [row["place"] for row in rows]
    series = [
        Series(label=label, x=places, y=[row[name] for row in rows], tone=_TONE, dashed=dashed)
        for label, name, dashed in (
            ("median head", "median", False),
            ("10 % and 90 % of heads", "low", True),
        )
    ]
    upper = Series(label="", x=places, y=[row["high"] for row in rows], tone=_TONE, dashed=True)
    chart = line_chart([*series, upper], "band, from fast (0) to slow (1)", "resultant length")
    caption = (
        f"<b>By band.</b> {kind('measured')} Over all layers and heads. Fast bands tell near "
        "tokens apart, slow ones carry what is far away."
    )
    return figure(key(series) + chart, caption)


def _totals(content: dict[str, Any], metrics: dict[str, float]) -> str:
    pairs = (
        ("Tokens read", metrics.get("serve/calibration_tokens")),
        ("Mean over heads and bands", content.get("mean")),
        ("Mean over heads, at the largest band", content.get("dominant")),
        ("Cosine of the centres of two halves of the text",
         metrics.get("serve/calibration_stability")),
    )  # fmt: skip
    rows = [[name, number(value)] for name, value in pairs if value is not None]
    return table(["Calibration", "measured"], rows)
