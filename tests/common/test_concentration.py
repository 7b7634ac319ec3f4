"""The report of calibrations: one square per head, bands, and damaged files."""

import json
import re

import pytest

from common.report import ReportConfig, story_page
from common.reporting.concentration import concentration
from common.reporting.runs import read_story

CONTENT = {
    "layers": [
        {"layer": 0, "dominant": [0.25, 0.5, 1.0], "mean": [0.2, 0.3, 0.4]},
        {"layer": 2, "dominant": [0.97], "mean": [0.5]},
    ],
    "bands": [
        {"place": 0.0, "low": 0.1, "median": 0.3, "high": 0.5},
        {"place": 1.0, "low": 0.2, "median": 0.6, "high": 0.9},
    ],
    "mean": 0.35,
    "dominant": 0.68,
}


def add_run(directory, content):
    """Write what ``lipllm calibrate`` leaves."""
    directory.mkdir()
    metrics = {"serve/calibration_tokens": 4096.0, "serve/calibration_stability": 0.997}
    record = {"command": "calibrate", "started": 0.0, "config": {}}
    (directory / "run.json").write_text(json.dumps(record))
    summary = {"command": "calibrate", "metrics": metrics, "seconds": 1.0}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "concentration.json").write_text(json.dumps(content))
    return read_story(directory)


def test_every_head_is_a_square_of_its_opacity(tmp_path):
    """Oracle: the numbers of the file; two of four heads are above 0.95."""
    markup = concentration(add_run(tmp_path / "run", CONTENT))
    heads = markup[markup.index("<svg") : markup.index("</svg>")]
    opacities = sorted(float(x) for x in re.findall(r"fill-opacity: ([0-9.]+)", heads))
    assert opacities == [0.2, 0.3, 0.4, 0.5]
    assert "50 % of heads are above 0.95" in markup
    assert markup.count("<svg") == 2
    assert "0.997" in markup
    assert "4,096" in markup


def test_report_shows_calibrations(tmp_path):
    """Oracle: the page of a run of the command holds the section, without a warning."""
    page = story_page(add_run(tmp_path / "run", CONTENT), ReportConfig())
    assert "Query centres" in page
    assert "could not be drawn" not in page


@pytest.mark.parametrize("content", [None, [], {"layers": []}], ids=["null", "list", "empty"])
def test_missing_figures_are_said(tmp_path, content):
    """Oracle: the section says that there is nothing."""
    markup = concentration(add_run(tmp_path / "run", content))
    assert "No query centres" in markup
    assert "<svg" not in markup
