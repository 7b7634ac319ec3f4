"""The table of a pruning study: every method at every budget, the best ones marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.reporting.charts import Series, key, line_chart
from common.reporting.page import (
    code,
    details,
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

COMMAND = "study"
ROTATION = "rotation+none"
HEADS = [
    *("removed", "keep", "method", "order", "", "bits/byte", "change", "KL, nats", "certificate"),
    *("kept", "tightened", "certified", "measured", "forward", "decode", "FLOPs", "params"),
]
_TEXT_COLUMNS = 5
_LABELS = {"mlp": "MLP neurons", "heads": "attention heads"}


def text_rows(content: Mapping[str, Any], *, most: int | None = None) -> list[list[str]]:
    """Return the rows as text, per budget the best first.

    Args:
        content: Of ``study.json``.
        most: At most so many per budget besides the default and the rotation; None for all.
    """
    rows = []
    for group in _budgets(content):
        for place, point in enumerate(group):
            is_asked = _method(point) in (content["default"], ROTATION)
            if most is None or place < most or is_asked:
                rows.append(_row(point, content))
    return rows


def study(story: Story) -> str:
    """Return the section with the frontier of methods, the verdicts and the whole table."""
    run = story.stage(COMMAND)
    content = run.json("study.json") if run else None
    title = "Pruning methods"
    lead = "Every score and compensation on the same calibration text, without any training."
    if not isinstance(content, dict) or not content.get("points"):
        return section(title, lead, missing("No table: the study has not finished."))
    charts = [chart for kind_ in _LABELS for chart in _charts(content, kind_)]
    rows = [[escape(cell) for cell in row] for row in text_rows(content)]
    return section(
        title,
        lead,
        f'<p class="note">Again: {code(run.command_line if run else "")}</p>',
        figures(*charts),
        _verdicts(content),
        _legend(content),
        details("All rows", table(HEADS, rows, text_columns=_TEXT_COLUMNS)),
    )


def _charts(content: Mapping[str, Any], kind_: str) -> list[str]:
    points = [point for point in content["points"] if point["kind"] == kind_]
    if not points:
        return []
    label = f"{_LABELS[kind_]} removed, %"
    keepers = [p for p in points if p["keeps_certificate"] and _method(p) != ROTATION]
    own = [p for p in points if _method(p) == content["default"]]
    one_shot = [p for p in own if p["order"] == "one_shot"]
    free = [p for p in points if not p["keeps_certificate"]]
    bits = [
        _line("default", one_shot, "val_bits_per_byte", tone="proved"),
        _line("best that keeps the certificate", keepers, "val_bits_per_byte", tone="second"),
        _line("best that does not", free, "val_bits_per_byte", tone="neutral", dashed=True),
        _line(
            "rotation", [p for p in points if _method(p) == ROTATION], "val_bits_per_byte",
            tone="third",
        ),
    ]  # fmt: skip
    quality = f"<b>Quality.</b> {kind('measured')} Validation loss of the really smaller models."
    level = ("dense", content["dense"]["val_bits_per_byte"])
    moved = [
        _line("certified", one_shot, "certified_deviation", tone="proved"),
        _line("measured", one_shot, "measured_deviation", tone="measured"),
    ]
    deviation = (
        f"<b>Change of the output</b> by the default, RMS of the logits. {kind('proved')} "
        f"Certified: for every input. {kind('measured')} Measured: on validation text."
    )
    speeds = [
        _line("forward pass", _timed(one_shot, content, "forward"), "ratio", tone="measured"),
        _line("decode step", _timed(one_shot, content, "decode"), "ratio", tone="third"),
        _line("operations", _saved(one_shot, content), "ratio", tone="neutral", dashed=True),
    ]
    speed = (
        f"<b>Speed.</b> {kind('measured')} Dense over pruned time, medians of pairs. "
        f"{kind('estimate')} Dashed: dense over pruned operations."
    )
    return [
        _drawn(bits, label, "bits per byte", quality, level=level),
        _drawn(moved, label, "RMS of the logits, log scale", deviation, log_y=True),
        _drawn(speeds, label, "times faster", speed),
    ]


def _drawn(
    series: Sequence[Series | None], x_label: str, y_label: str, caption: str, **style: Any
) -> str:
    shown = [one for one in series if one is not None]
    return figure(key(shown) + line_chart(shown, x_label, y_label, **style), caption)


def _line(label: str, points: Sequence[Mapping[str, Any]], name: str, **style: Any) -> Any:
    """Return the smallest value at each budget as a line, or None without any."""
    found: dict[float, float] = {}
    for point in points:
        if point.get(name) is not None:
            x = 100 * (1 - point["keep"])
            found[x] = min(point[name], found.get(x, point[name]))
    places = sorted(found)
    if not places:
        return None
    return Series(label=label, x=places, y=[found[x] for x in places], markers=True, **style)


def _timed(
    points: Sequence[Mapping[str, Any]], content: Mapping[str, Any], what: str
) -> list[dict[str, Any]]:
    return [
        {"keep": p["keep"], "ratio": content["shapes"][p["shape"]][what]["ratio"]} for p in points
    ]


def _saved(
    points: Sequence[Mapping[str, Any]], content: Mapping[str, Any]
) -> list[dict[str, float]]:
    return [{"keep": p["keep"], "ratio": content["dense"]["flops"] / p["flops"]} for p in points]


def _verdicts(content: Mapping[str, Any]) -> str:
    heads = ["Removed", "keep", "best that keeps the certificate", "bits/byte"]
    heads += ["default: gap", "in sequence: gap", "default over rotation", "default is"]
    rows = [
        [
            escape(_LABELS[verdict["kind"]]),
            number(verdict["keep"]),
            escape(verdict["best"]),
            number(verdict["bits"], 4),
            number(verdict["gap"]),
            number(verdict["sequential_gap"]),
            number(verdict["rotation_gap"]),
            _judgement(verdict),
        ]
        for verdict in content["verdicts"]
    ]
    return table(heads, rows, text_columns=3)


def _judgement(verdict: Mapping[str, Any]) -> str:
    if not verdict["keeps_certificate"]:
        return "above the dense bound"
    return "best or tied" if verdict["tied"] else "behind"


def _legend(content: Mapping[str, Any]) -> str:
    one = next(iter(content["shapes"].values()))
    forward, decode = one["forward"], one["decode"]
    return (
        f'<p class="note">{kind("measured")} bits per byte, KL divergence from the dense model, '
        f"measured: largest RMS change of the logits, times ({forward['batch']} sequences of "
        f"{forward['length']} tokens; a decode step behind {decode['length']} tokens). "
        f"{kind('proved')} certificate: bound from norms, dense "
        f"{number(content['dense']['cert_naive'], 4)}; tightened: the proved constant, dense "
        f"{number(content['dense']['cert_tightened'], 4)}; kept: the latter, or the former where "
        "no row was tightened, is not above the dense one; certified: bound on the change "
        f"for every input. {kind('estimate')} FLOPs, from shapes. Methods within 0.002 bits per "
        "byte of the best are tied.</p>"
    )


def _budgets(content: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """Return the rows of each budget, the best first."""
    groups: dict[tuple[bool, float], list[Mapping[str, Any]]] = {}
    for point in content["points"]:
        groups.setdefault((point["kind"] == "heads", -point["keep"]), []).append(point)
    return [sorted(groups[b], key=lambda point: point["val_bits_per_byte"]) for b in sorted(groups)]


def _row(point: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    dense, shape = content["dense"], content["shapes"][point["shape"]]
    return [
        point["kind"],
        f"{point['keep']:g}",
        _method(point) + (" (default)" if _method(point) == content["default"] else ""),
        point["order"],
        point["mark"],
        f"{point['val_bits_per_byte']:.4f}",
        f"{point['val_bits_per_byte'] - dense['val_bits_per_byte']:+.4f}",
        f"{point['kl_nats']:.4f}",
        f"{point['cert_naive']:.5g}",
        "yes" if point["keeps_certificate"] else "no",
        _plain(point["cert_tightened"]),
        _plain(point["certified_deviation"]),
        _plain(point["measured_deviation"]),
        f"{shape['forward']['ratio']:.2f}x",
        f"{shape['decode']['ratio']:.2f}x",
        f"{100 * point['flops'] / dense['flops']:.1f}%",
        f"{100 * point['params'] / dense['params']:.1f}%",
    ]


def _method(point: Mapping[str, Any]) -> str:
    return f"{point['score']}+{point['comp']}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
