"""The small frontier as a user meets it, with even smaller cells: swept, repeated, reported."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SWEEP = Path("runs/train/sweeps/frontier_shakespeare_small")
TINY = (
    "experiment=frontier_shakespeare_small",
    "device=cpu",
    "model=nano",
    "model.width=16",
    "model.context=16",
    "trainer.max_steps=4",
    "trainer.batch_size=4",
    "trainer.final_windows=64",
    "constraint.w_max=1.0",
    "constraint=soft_cap",
    "rate=low",
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_small_frontier_is_swept_repeated_and_reported(
    text_file: Path, lipllm: Callable[..., Any]
) -> None:
    """Oracle: a cell that cannot work (AdamW under the soft cap) is a row; the other is kept."""
    arguments = ("-m", *TINY, f"data.path={text_file}")
    first = lipllm("train", *arguments)
    assert first.status == 2
    assert "optim=adamw" in first.err.splitlines()[-1]
    [summary] = SWEEP.glob("*/summary.json")
    written = summary.stat().st_mtime_ns
    assert lipllm("train", *arguments).status == 2
    assert summary.stat().st_mtime_ns == written
    stored = json.loads((summary.parent / "margins.json").read_text())
    assert 0 <= stored["accuracy"] <= 1
    done = lipllm("report", f"sweep={SWEEP}")
    assert done.status == 0, done.err[-2000:]
    path = Path(done.out.splitlines()[-1].removeprefix("summary: "))
    artifacts = json.loads(path.read_text())["artifacts"]
    rows = list(csv.DictReader((path.parent / artifacts["comparison"]).read_text().splitlines()))
    assert sorted(row["status"].split(":")[0] for row in rows) == ["failed", "finished"]
    page = (path.parent / artifacts["report"]).read_text("utf-8")
    assert page.count("<svg ") == 3
    assert "unsound for 4 heads" in page
    assert "soft_cap" in page
