"""Tables of a bench: all figures of a policy and budget in one row, and how speeds were timed."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.reporting.bench import COMBINED, bench, note, text_table
from common.reporting.runs import read_story

QUALITY: dict[str, Any] = {
    "part": "quality",
    "policy": "full",
    "bits_per_token": 2.0,
    "budget": 1.0,
}
OWN: dict[str, Any] = {"policy": "window", "summary_tokens": 1, "budget": 0.25}
TIMED: dict[str, Any] = {"device": "cpu, 1 thread", "clock": "processor"}
SPEED: dict[str, Any] = {
    "part": "speed", "context": 64, "batch": 1, "tokens_per_s": 30.0, "ratio": 1.5,
    "ratio_low": 1.0, "ratio_high": 2.0, "cached": 16.0, "kv_bytes": 10.0, **TIMED,
}  # fmt: skip
ROWS = [
    QUALITY,
    {**QUALITY, **OWN, "bits_per_token": 3.0, "kl_vs_full": 0.5},
    {"part": "tasks", "task": "recall", "policy": "full", "exact": 1.0},
    {"part": "tasks", "task": "recall", **OWN, "query": "late", "exact": 0.75},
    {**SPEED, "policy": "full", "tokens_per_s": 20.0, "ratio": 1.0},
    {**SPEED, **OWN},
]


def test_one_table_has_all_figures_of_a_policy() -> None:
    """Oracle: the rows above by hand; perplexity is two to the bits per token."""
    heads, lines = text_table(ROWS, COMBINED)
    assert heads == [
        "policy", "mean tokens", "budget", "KL, nats", "perplexity", "exact, question known",
        "exact, question late", "token/s, 64 x 1", "times full, 64 x 1",
    ]  # fmt: skip
    assert lines == [
        ["window", "1", "0.25", "0.5", "8", "", "0.75", "30", "1.5"],
        ["full", "", "", "", "4", "1", "1", "20", "1"],
    ]
    assert text_table(ROWS[:2], COMBINED) == ([], [])


def test_policies_without_quality_are_sorted_by_their_answers() -> None:
    """Oracle: the documented order, best first within a budget, whatever order they ran in."""
    better = {**ROWS[3], "policy": "keydiff", "exact": 0.875}
    rows = [ROWS[2], ROWS[3], better, ROWS[4], ROWS[5]]
    assert [line[0] for line in text_table(rows, COMBINED)[1]] == ["keydiff", "window", "full"]


def test_columns_without_a_value_are_left_out() -> None:
    """Oracle: there is a certified column only where a row has a bound."""
    assert "certified" not in text_table(ROWS, "quality")[0]
    proved = [{**row, "certified_deviation": 0.1} for row in ROWS[:2]]
    assert "certified" in text_table(proved, "quality")[0]


def test_clocks_are_named_and_never_mixed() -> None:
    """Oracle: one device and clock is said once, several in the headings as well."""
    assert note(ROWS[:4]) == ""
    assert "(cpu, 1 thread, processor seconds)" in note(ROWS)
    other = {**SPEED, **OWN, "device": "a GPU", "clock": "wall", "tokens_per_s": 99.0}
    heads, lines = text_table([*ROWS, other], COMBINED)
    assert "token/s, 64 x 1 (a GPU, wall seconds)" in heads
    assert {"99", "30"} <= set(lines[0])


def test_report_says_how_speeds_were_timed(tmp_path: Path) -> None:
    """Oracle: the section of a run directory with these rows."""
    (tmp_path / "bench.json").write_text(json.dumps({"rows": ROWS}))
    summary = {"command": "bench", "status": "finished", "metrics": {}, "artifacts": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    markup = bench(read_story(tmp_path))
    assert "processor seconds" in markup
    assert "<summary>policies</summary>" in markup
    assert "perplexity" in markup
    with pytest.raises(KeyError):
        text_table(ROWS, "beauty")
