"""Command ``export``: default place, chosen place, refusals in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

SHIPPED = "bundle=shakespeare-2lip"


def test_default_place_is_the_run_s(lipllm: Any) -> None:
    """Oracle: the summary names the folder; it is complete."""
    done = lipllm("export", SHIPPED)
    assert done.status == 0, done.err
    summary = json.loads((done.directory / "summary.json").read_text())
    assert summary["artifacts"] == {"hugging_face": "hugging_face"}
    assert (done.directory / "hugging_face" / "model.safetensors").is_file()


def test_chosen_place_and_type(lipllm: Any, tmp_path: Path) -> None:
    """Oracle: half the bytes; a second export needs force."""
    place = tmp_path / "out"
    settings = (SHIPPED, f"export.path={place}")
    done = lipllm("export", *settings)
    assert done.status == 0, done.err
    whole = (place / "model.safetensors").stat().st_size
    again = lipllm("export", *settings, "export.dtype=bfloat16")
    assert (again.status, again.err.count("\n")) == (2, 1)
    assert "force=true" in again.err
    done = lipllm("export", *settings, "export.dtype=bfloat16", "force=true")
    assert done.status == 0, done.err
    assert (place / "model.safetensors").stat().st_size < 0.6 * whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bundle=nowhere", "nowhere"),
        ("export.dtype=int8", "export.dtype='int8': expected one of"),
        ("export.path=3", "export.path=3"),
    ],
)
def test_refusals_are_one_line(lipllm: Any, tmp_path: Path, override: str, message: str) -> None:
    """Oracle: the rule for bad input; nothing is written."""
    done = lipllm("export", *((SHIPPED,) if "bundle" not in override else ()), override)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("lipllm: error: ")
    assert message in done.err
    runs = tmp_path / "runs" / "export"
    assert not runs.exists() or list(runs.iterdir()) == []
