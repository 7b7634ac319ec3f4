"""What reports are made of: numbers and charts."""

import math

import pytest

from common.reporting.charts import Series, bar_chart, line_chart, time_chart
from common.reporting.page import number, percent


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "&ndash;"),
        (0.0, "0"),
        (16.0, "16"),
        (1320.0, "1,320"),
        (0.0123456, "0.0123"),
        (2.0, "2"),
        (2.4137, "2.41"),
        (1234.567, "1,235"),
        (math.inf, "overflow"),
        (1.5e-7, "1.50&nbsp;&times;&nbsp;10<sup>-7</sup>"),
        (9.99953e-7, "1.00&nbsp;&times;&nbsp;10<sup>-6</sup>"),
        (5e-324, "4.94&nbsp;&times;&nbsp;10<sup>-324</sup>"),
        (-1.5e9, "-1.50&nbsp;&times;&nbsp;10<sup>9</sup>"),
    ],
)
def test_numbers_are_readable(value, expected):
    """Oracle: three significant digits, written by hand."""
    assert number(value) == expected


def test_percent():
    """Oracle: written by hand."""
    assert percent(0.1825) == "18.2&nbsp;%"
    assert percent(None) == "&ndash;"


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf], [0.0, -1.0], [1e-300, 1e300]])
def test_charts_survive_hard_values(values):
    """Oracle: an SVG element without warnings (they are errors here), whatever the numbers."""
    x = [float(i) for i in range(len(values))]
    one = Series(label="a", x=x, y=values)
    lines = [line_chart([one], "x", "y", log_y=log_y) for log_y in (False, True)]
    for chart in (*lines, bar_chart([str(i) for i in x], [Series(label="a", y=values)], "y")):
        assert chart.startswith("<svg ")
        assert chart.endswith("</svg>")
    assert time_chart([], []).startswith("<svg ")


def test_charts_are_deterministic():
    """Oracle: the same input gives the same bytes, so reports can be compared."""
    one = Series(label="a", x=[1.0, 2.0], y=[3.0, 4.0], markers=True)
    assert line_chart([one], "x", "y") == line_chart([one], "x", "y")
