"""Charts as inline SVG that follow the page's colours, light and dark.

matplotlib draws with placeholder colours, which are replaced by the page's CSS variables; text
stays text. Colours carry meaning: one tone for what is proved, another for what is measured.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from common.reporting.page import escape

# Tone to placeholder colour; the page defines the CSS variable of the same name.
TONES = {
    "ink": "#010203",
    "muted": "#040506",
    "grid": "#070809",
    "proved": "#0a0b0c",
    "naive": "#0d0e0f",
    "measured": "#101112",
    "neutral": "#131415",
    "second": "#161718",
    "third": "#191a1b",
}
# For series that are alternatives; blue and orange keep their meaning.
SERIES_TONES = ("second", "third", "neutral", "measured", "naive", "proved")
# Beyond these a logarithmic axis itself overflows.
_TINY, _HUGE = 1e-100, 1e100
_SIZE_INCHES = (5.4, 2.9)
_STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lipllm",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.linewidth": 0.8,
    "axes.edgecolor": TONES["grid"],
    "axes.labelcolor": TONES["muted"],
    "xtick.color": TONES["grid"],
    "ytick.color": TONES["grid"],
    "xtick.labelcolor": TONES["muted"],
    "ytick.labelcolor": TONES["muted"],
    "text.color": TONES["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "axes.formatter.use_mathtext": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line, or one colour of bars.

    Attributes:
        label: Name in the key.
        y: Values; None leaves a gap.
        x: Positions; empty for bars.
        tone: Colour, one of ``TONES``.
        dashed: Whether the line is dashed.
        markers: Whether each value is marked.
    """

    label: str
    y: Sequence[float | None]
    x: Sequence[float] = ()
    tone: str = "proved"
    dashed: bool = False
    markers: bool = False


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    log_x: bool = False,
    level: tuple[str, float] | None = None,
    ticks: Sequence[str] | None = None,
) -> str:
    """Return lines over a common horizontal axis as an ``<svg>`` element.

    Args:
        series: What to draw, each with ``x``.
        x_label: What the horizontal axis shows, with its unit.
        y_label: What the vertical axis shows, with its unit.
        log_y: Logarithmic vertical axis; values that are not positive are left out.
        log_x: Logarithmic horizontal axis; all positions are positive.
        level: Label and height of a horizontal line for comparison.
        ticks: Labels of the positions 0, 1, ... of a horizontal axis without numbers.
    """

    def draw(axes: Any) -> None:
        for one in series:
            x, y = _points(one, positive=log_y)
            axes.plot(
                x,
                y,
                color=TONES[one.tone],
                linewidth=1.8,
                linestyle=(0, (4, 2)) if one.dashed else "-",
                marker="o" if one.markers or len(x) < 2 else None,
                markersize=4.5,
                clip_on=False,
            )
        if level is not None:
            axes.axhline(level[1], color=TONES["neutral"], linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(
                level[0],
                (1, level[1]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=TONES["muted"],
                fontsize=8,
            )
        if log_y:
            _log_scale(axes)
        if log_x:
            axes.set_xscale("log")
            places = sorted({x for one in series for x in one.x})
            axes.set_xticks(places, [f"{x:g}" for x in places], minor=False)
            axes.minorticks_off()
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)

    return render(draw, f"{y_label} over {x_label}", title=y_label)


def bar_chart(groups: Sequence[str], series: Sequence[Series], y_label: str) -> str:
    """Return grouped bars as an ``<svg>`` element; dots on a logarithmic axis for wide ranges.

    Args:
        groups: Labels on the horizontal axis.
        series: One value per group each, or None.
        y_label: What the vertical axis shows, with its unit.
    """
    values = [v for one in series for v in one.y if v is not None and _TINY <= v <= _HUGE]
    is_wide = bool(values) and max(values) > 50 * min(values)
    width = 0.8 / max(1, len(series))

    def draw(axes: Any) -> None:
        for order, one in enumerate(series):
            offset = (order - (len(series) - 1) / 2) * width
            places = [(i + offset, v) for i, v in enumerate(one.y) if v is not None]
            x, y = [p for p, _ in places], [v if 0 <= v <= _HUGE else None for _, v in places]
            if is_wide:
                axes.plot(x, y, "o", color=TONES[one.tone], markersize=5, clip_on=False)
            else:
                heights = [0.0 if v is None else v for v in y]
                axes.bar(x, heights, width * 0.92, color=TONES[one.tone], linewidth=0)
        if is_wide:
            _log_scale(axes)
        axes.set_xticks(range(len(groups)), groups, rotation=0 if len(groups) <= 8 else 60)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)
        axes.set_axisbelow(True)

    return render(draw, y_label, title=y_label)


def time_chart(labels: Sequence[str], seconds: Sequence[float]) -> str:
    """Return horizontal bars of durations in seconds as an ``<svg>`` element."""

    def draw(axes: Any) -> None:
        rows = range(len(labels))
        axes.barh(rows, seconds, 0.62, color=TONES["neutral"], linewidth=0)
        for row, value in zip(rows, seconds, strict=True):
            axes.annotate(
                f"{value:.1f} s",
                (value, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=TONES["muted"],
            )
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", labelcolor=TONES["ink"])
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, 1.15 * max([*seconds, 1e-9]))
        axes.invert_yaxis()

    return render(draw, "seconds per stage", size=(5.4, 0.5 + 0.28 * len(labels)))


def key(series: Sequence[Series]) -> str:
    """Return the series' colours and names as HTML, to stand above a chart."""
    items = []
    for one in series:
        mark = "dash" if one.dashed else "solid"
        swatch = f'<i class="{mark}" style="color:var(--{one.tone})"></i>'
        items.append(f"<span>{swatch}{escape(one.label)}</span>")
    return f'<div class="key">{"".join(items)}</div>'


def _log_scale(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Few decades need more than powers of ten.
    steps = (
        (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0) if high > 3 * low else (1, 1.5, 2, 3, 5, 7)
    )
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _points(one: Series, *, positive: bool) -> tuple[list[float], list[float]]:
    pairs = zip(one.x, one.y, strict=True)
    low = _TINY if positive else -_HUGE
    kept = [(x, y) for x, y in pairs if y is not None and low <= y <= _HUGE]
    return [x for x, _ in kept], [y for _, y in kept]


def render(
    draw: Callable[[Any], None],
    description: str,
    *,
    title: str = "",
    size: tuple[float, float] = _SIZE_INCHES,
) -> str:
    """Return what ``draw`` puts on a pair of axes as an ``<svg>`` element.

    Args:
        draw: Called with the matplotlib axes; it uses the colours of ``TONES``.
        description: Text alternative of the chart.
        title: Heading inside the chart.
        size: Width and height, inches.
    """
    # The object interface, not pyplot: no global state, no display.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if title:
            axes.set_title(title, loc="left", fontsize=9, color=TONES["muted"], pad=8)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), description)


def _inline(document: str, description: str) -> str:
    """Cut an SVG document down to an element of the page: colours as variables."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    for tone, colour in TONES.items():
        svg = svg.replace(colour, f"var(--{tone})")
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg).replace("xlink:href", "href")
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    view = box.group(0) if box else ""
    label = escape(description)
    return f'<svg {view} role="img" aria-label="{label}">{rest}'.strip()
