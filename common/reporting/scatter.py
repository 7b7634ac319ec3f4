"""Charts of a frontier: points with a staircase of the best, and many falling curves."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from common.reporting import charts
from common.reporting.charts import TONES
from common.reporting.page import escape

# matplotlib marker to the character that stands for it in the key.
MARKERS = {
    "o": "&#9679;",
    "s": "&#9632;",
    "^": "&#9650;",
    "D": "&#9670;",
    "v": "&#9660;",
    "P": "&#10010;",
    "X": "&#10006;",
    "*": "&#9733;",
}
HOLLOW = "&#9675;"
# Exponents up to which a number is written out; labels of a logarithmic axis.
_WIDEST_PLAIN = 4
_FEW_DECADES, _MOST_DECADES = 2.2, 9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cloud:
    """Points of one kind.

    Attributes:
        label: Name in the key.
        x: Decimal logarithms.
        y: Heights, as many.
        tone: Colour, one of ``TONES``.
        marker: Shape, one of ``MARKERS``.
        hollow: Outline only: for what others have published.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str
    marker: str = "o"
    hollow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One falling line.

    Attributes:
        x: Positions, increasing, above 0.
        y: Heights.
        tone: Colour.
        strong: Drawn thick, above the others.
    """

    x: Sequence[float]
    y: Sequence[float]
    tone: str
    strong: bool = False


def scatter_chart(
    clouds: Sequence[Cloud],
    front: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    description: str,
) -> str:
    """Return points over a decimal logarithm as an ``<svg>`` element.

    Args:
        clouds: What to draw.
        front: Undominated points by increasing x; drawn as a staircase to the right.
        x_label: Of the quantity whose logarithm is x.
        y_label: With its unit.
        description: Text alternative: what can be read off the chart.
    """

    def draw(axes: Any) -> None:
        every = [x for cloud in clouds for x in cloud.x]
        right = max(every, default=1.0)
        if front:
            x, y = [p[0] for p in front], [p[1] for p in front]
            x, y = [*x, max(right, x[-1])], [*y, y[-1]]
            axes.plot(x, y, color=TONES["muted"], linewidth=1.2, drawstyle="steps-post", zorder=1)
        for cloud in clouds:
            colour = TONES[cloud.tone]
            axes.plot(
                cloud.x,
                cloud.y,
                linestyle="none",
                marker=cloud.marker,
                markersize=7 if cloud.hollow else 6,
                markeredgecolor=colour,
                markerfacecolor="none" if cloud.hollow else colour,
                markeredgewidth=1.2 if cloud.hollow else 0.6,
                clip_on=False,
                zorder=2 if cloud.hollow else 3,
            )
        _decades(axes, every)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)
        axes.set_axisbelow(True)

    return charts.render(draw, description, title=y_label)


def curve_chart(curves: Sequence[Curve], x_label: str, y_label: str, description: str) -> str:
    """Return falling curves over a logarithmic axis as an ``<svg>`` element."""

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for curve in sorted(curves, key=lambda one: one.strong):
            axes.plot(
                curve.x,
                curve.y,
                color=TONES[curve.tone],
                linewidth=1.9 if curve.strong else 0.8,
                alpha=1.0 if curve.strong else 0.45,
            )
        axes.set_ylim(bottom=0)
        _plain_logarithm(axes)
        axes.set_xlabel(x_label)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)

    return charts.render(draw, description, title=y_label)


def marker_key(clouds: Sequence[Cloud], front_label: str = "") -> str:
    """Return shapes, colours and names as HTML, to stand above a chart."""
    items = []
    for cloud in clouds:
        mark = HOLLOW if cloud.hollow else MARKERS[cloud.marker]
        swatch = f'<b style="color:var(--{cloud.tone})">{mark}</b> '
        items.append(f"<span>{swatch}{escape(cloud.label)}</span>")
    if front_label:
        items.append(f'<span><i style="color:var(--muted)"></i>{escape(front_label)}</span>')
    return f'<div class="key">{"".join(items)}</div>'


def _decades(axes: Any, logarithms: Sequence[float]) -> None:
    """Label an axis of decimal logarithms with the numbers themselves, where they are short."""
    low, high = min(logarithms, default=0.0), max(logarithms, default=1.0)
    space = 0.05 * (high - low) + 0.05
    low, high = low - space, high + space
    step = max(1, math.ceil((high - low) / _MOST_DECADES))
    factors = (1, 2, 5) if high - low <= _FEW_DECADES else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1, step)
    places = [e + math.log10(factor) for e in exponents for factor in factors]
    places = [place for place in places if low <= place <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(places, [_power(place) for place in places])


def _plain_logarithm(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(math.log10(value))))


def _power(exponent: float) -> str:
    if abs(exponent) <= _WIDEST_PLAIN:
        return f"{float(f'{10**exponent:.3g}'):,.10g}"
    return f"1e{exponent:.0f}"
