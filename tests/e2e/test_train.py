"""``lipllm train`` as a user meets it: swept, and given bad input."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "model=nano",
    "logger=csv",
    "data=shakespeare",
    "device=cpu",
    "trainer.batch_size=8",
    "trainer.val_every=0",
    "trainer.final_windows=64",
    "callbacks.certificate_every=0",
    "callbacks.sample_every=0",
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_sweep_of_four_runs_is_compared(text_file: Path, lipllm: Callable[..., Any]) -> None:
    """Oracle: four summaries with distinct settings; the table has one row for each cell."""
    sweep = ("-m", "seed=1,2", "optim.lr=0.05,0.1", "hydra.sweep.dir=sweep", "trainer.max_steps=5")
    done = lipllm("train", *TINY, f"data.path={text_file}", *sweep)
    assert done.status == 0, done.err[-2000:]
    summaries = [json.loads(path.read_text()) for path in Path("sweep").rglob("summary.json")]
    assert len({summary["config_hash"] for summary in summaries}) == 4
    table = lipllm("report", "sweep=sweep")
    assert table.status == 0, table.err[-2000:]
    path = Path(table.out.splitlines()[-1].removeprefix("summary: "))
    comparison = path.parent / json.loads(path.read_text())["artifacts"]["comparison"]
    rows = list(csv.DictReader(comparison.read_text(encoding="utf-8").splitlines()))
    cells = {(row["seed"], row["optim.lr"]) for row in rows}
    assert len(rows) == 4
    assert cells == set(itertools.product(("1", "2"), ("0.05", "0.1")))
    assert all(float(row["train/val_bits_per_byte"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["trainer.max_step=3"], "did you mean trainer.max_steps?"),
        (["model=papr"], "did you mean paper?"),
        (["trainer.max_steps=abc"], "max_steps='abc'"),
        (["constraint.w_max=-1"], "constraint.w_max=-1"),
        (["data.path=missing.txt"], "missing.txt"),
        (["data.path=empty.txt"], "empty.txt"),
        (["data.path=short.txt"], "short.txt"),
        (["data.path=null"], "data.path"),
        (["device=tpu"], "device=tpu"),
    ],
)
def test_bad_input_is_one_line(
    text_file: Path, lipllm: Callable[..., Any], overrides: list[str], text: str
) -> None:
    """Oracle: one line that names the value, status 2, and nothing left behind."""
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    done = lipllm("train", *TINY, f"data.path={text_file}", *overrides)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert done.err.startswith("lipllm: error: ")
    assert text in done.err
    assert not list(Path("runs/train").glob("*"))
