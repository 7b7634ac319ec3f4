"""Residual against oracle calls on logarithmic axes: for one run, or for methods side by side."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from common.reporting import charts
from common.reporting.charts import SERIES_TONES, TONES, Series
from common.reporting.page import palette

X_LABEL = "oracle calls in components"
Y_LABEL = "smallest residual so far"
_SMALLEST = 1e-300  # a residual of zero cannot stand on a logarithmic axis


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """One falling line.

    Attributes:
        label: Name in the key.
        calls: Oracle calls, increasing.
        best: Smallest residual up to there.
    """

    label: str
    calls: Sequence[float]
    best: Sequence[float]


def series(courses: Sequence[Course]) -> list[Series]:
    """Return the courses as lines with a colour each; a second round of colours is dashed."""
    tones = len(SERIES_TONES)
    return [
        Series(
            label=course.label,
            x=course.calls,
            y=course.best,
            tone=SERIES_TONES[number % tones],
            dashed=number >= tones,
        )
        for number, course in enumerate(courses)
    ]


def convergence_chart(courses: Sequence[Course]) -> str:
    """Return the courses on two logarithmic axes as an ``<svg>`` element."""

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for one in series(courses):
            points = [
                (x, y)
                for x, y in zip(one.x, one.y, strict=True)
                if x > 0 and y is not None and _SMALLEST < y < float("inf")
            ]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=TONES[one.tone],
                linewidth=1.8,
                linestyle=(0, (4, 2)) if one.dashed else "-",
                marker="o" if len(points) == 1 else None,
                markersize=4.5,
            )
        for axis in (axes.xaxis, axes.yaxis):
            _label_powers(axis)
        axes.set_xlabel(X_LABEL)
        axes.grid(axis="y", color=TONES["grid"], linewidth=0.6)

    return charts.render(draw, f"{Y_LABEL} over {X_LABEL}", title=Y_LABEL)


def convergence_svg(courses: Sequence[Course]) -> str:
    """Return the chart as a document of its own, which follows light and dark like the page."""
    head, body = convergence_chart(courses).split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}><style>{palette()} svg {{ font-family: sans-serif }}</style>{body}\n"


def _label_powers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 300 * low else (1.0, 3.0)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
