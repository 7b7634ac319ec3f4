"""Runs of ``lipllm campaign``: how near attacks came to the bounds, and how much was tried."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.charts import TONES, render
from common.reporting.page import (
    escape,
    figure,
    figures,
    kind,
    missing,
    number,
    section,
    table,
)
from common.reporting.runs import Story

COMMAND = "campaign"
_TITLE = "Attempts to refute the bounds"
_LEAD = "Random models, each proved, checked and attacked. An attack above a bound refutes a proof."
_SHOWN = 8


def campaign(story: Story) -> str:
    """Return the plot of attack over bound per configuration; empty where no campaign ran."""
    run = story.stages.get(COMMAND)
    if run is None or not run.summary:
        return ""
    path = run.artifact("campaign")
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) if path else []
        best = _per_configuration(rows)
    except (OSError, ValueError, KeyError, TypeError):
        return section(_TITLE, _LEAD, missing("No campaign.csv: the attempts cannot be drawn."))
    metrics = run.metrics
    tried = (
        f'<p class="note">{kind("measured")} '
        f"{number(metrics['campaign/pairs'])} random (weights, inputs, perturbations) and at least "
        f"{number(metrics['campaign/restarts'])} gradient restarts on each of "
        f"{number(metrics['campaign/configurations'])} configurations: "
        f"{number(metrics['campaign/violations'])} violations. Largest ratio of attack to bound: "
        f"{number(metrics['campaign/largest_ratio'])} for a network, "
        f"{number(metrics['campaign/largest_block_ratio'])} for a block.</p>"
    )
    caption = (
        f"{kind('estimate')} Best attack over the proved bound of the network, the largest of each "
        "configuration. 1 is the line that no point may cross."
    )
    return section(_TITLE, _LEAD, tried, figures(figure(_chart(best), caption)), _worst(best))


def _per_configuration(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        ratio = float(row["ratio"])
        if row["configuration"] not in best or ratio > best[row["configuration"]]["ratio"]:
            best[row["configuration"]] = {**row, "ratio": ratio, "depth": int(row["depth"])}
    return sorted(best.values(), key=lambda row: -row["ratio"])


def _chart(best: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Any) -> None:
        for row in best:
            x, y = float(row["w_max"]), max(row["ratio"], 1e-12)
            axes.plot(x, y, "o", color=TONES["measured"], markersize=3 + 0.8 * row["depth"] / 2)
        axes.axhline(1.0, color=TONES["proved"], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.set_xlabel("norm of every matrix (RMS to RMS); larger dots are deeper models")
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)

    return render(draw, "attack over bound against the norm", title="attack / proved bound")


def _worst(best: Sequence[Mapping[str, Any]]) -> str:
    names = ("heads", "depth", "w_max", "activation", "position", "biases", "residual", "spectrum")
    heads = ["Attack / bound", *(name.replace("_", " ") for name in names)]
    rows = [
        [number(row["ratio"]), *(escape(str(row[name])) for name in names)] for row in best[:_SHOWN]
    ]
    return table(heads, rows, text_columns=0)
