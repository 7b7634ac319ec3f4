"""Run directories: identity, lock, resume, and what is written when."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import ledger
from common.errors import ConfigError, DataError
from common.ledger import (
    Outcome,
    Run,
    claim,
    config_hash,
    find_unfinished,
    perform,
    read_json,
    write_json,
)

FIELDS = ["command", "status", "metrics", "artifacts", "config_hash", "seconds", "versions"]


def _run(directory: Path, digest: str = "h", command: str = "c") -> Run:
    directory.mkdir(exist_ok=True)
    return Run(command=command, directory=directory, config={}, config_hash=digest)


def _body(settings: Any, run: Run) -> Outcome:
    (run.directory / "out.bin").write_bytes(b"1")
    return Outcome(artifacts={"out": run.directory / "out.bin"}, objective=0.5)


def _failing(settings: Any, run: Run) -> Outcome:
    raise DataError("text is empty: expected at least one byte; choose another file")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"logger": {"mode": "online"}}, True),
        ({"force": True}, True),
        ({"name": "x"}, True),
        ({"seed": 1}, False),
        ({"model": {"width": 2}}, False),
    ],
)
def test_hash_covers_what_determines_the_result(change: dict[str, Any], same: bool) -> None:
    """Oracle: the list of keys that never change a result."""
    config = {"seed": 0, "model": {"width": 1}, "logger": {}, "force": False, "name": None}
    assert (config_hash(config | change) == config_hash(config)) is same


def test_hash_ignores_the_order_of_keys_and_sees_inputs() -> None:
    """Oracle: equality of mappings; an input is part of the identity."""
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash({"a": 1}, inputs=["x"]) != config_hash({"a": 1}, inputs=["y"])
    assert config_hash({"a": 1, "b": 2}, keys=["a"]) == config_hash({"a": 1, "b": 3}, keys=["a"])


def test_summary_has_exactly_the_declared_fields(tmp_path: Path) -> None:
    """Oracle: the field list of the design; artifacts are relative to the summary."""
    finished = perform(_run(tmp_path), _body, None)
    summary = read_json(finished.path)
    assert summary is not None
    assert list(summary) == FIELDS
    assert summary["artifacts"] == {"out": "out.bin"}
    assert summary["status"] == "finished"


def test_finished_run_is_skipped_and_force_repeats_it(tmp_path: Path) -> None:
    """Oracle: the time stamp in the first summary stays unless forced; the objective is kept."""
    first = perform(_run(tmp_path), _body, None)
    again = perform(_run(tmp_path), _body, None)
    assert (again.skipped, again.summary, again.objective) == (True, first.summary, 0.5)
    assert not perform(_run(tmp_path), _body, None, force=True).skipped


def test_lost_artifact_repeats_the_run(tmp_path: Path) -> None:
    """Oracle: a summary that names a missing file does not count."""
    perform(_run(tmp_path), _body, None)
    (tmp_path / "out.bin").unlink()
    assert not perform(_run(tmp_path), _body, None).skipped


def test_failing_run_leaves_no_summary_and_is_resumed(tmp_path: Path) -> None:
    """Oracle: absence of the file, even of an earlier one; ``resumed`` at the next start."""
    perform(_run(tmp_path), _body, None)
    with pytest.raises(DataError):
        perform(_run(tmp_path), _failing, None, force=True)
    assert not (tmp_path / ledger.SUMMARY_FILE).exists()
    run = _run(tmp_path)
    perform(run, _body, None)
    assert run.resumed


@pytest.mark.parametrize(("digest", "command"), [("other", "c"), ("h", "other")])
def test_foreign_directory_is_refused(tmp_path: Path, digest: str, command: str) -> None:
    """Oracle: the earlier summary is untouched."""
    before = perform(_run(tmp_path), _body, None).path.read_bytes()
    with pytest.raises(ConfigError, match="other settings"):
        perform(_run(tmp_path, digest, command), _body, None)
    assert (tmp_path / ledger.SUMMARY_FILE).read_bytes() == before


def test_newest_unfinished_run_is_found(tmp_path: Path) -> None:
    """Oracle: by hand: finished, foreign and older ones do not count."""
    for name, started, digest in [("a", 1.0, "h"), ("b", 3.0, "h"), ("c", 9.0, "x")]:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {"config_hash": digest, "started": started})
    (tmp_path / "d").mkdir()
    write_json(tmp_path / "d/run.json", {"config_hash": "h", "started": 99.0})
    write_json(tmp_path / "d/summary.json", {})
    (tmp_path / "e").mkdir()
    (tmp_path / "e/run.json").write_text("{ truncated")
    assert find_unfinished(tmp_path, "h") == tmp_path / "b"
    assert find_unfinished(tmp_path, "none") is None


def test_running_run_is_neither_found_nor_entered(tmp_path: Path) -> None:
    """Oracle: another process that holds the directory."""
    (tmp_path / "a").mkdir()
    write_json(tmp_path / "a/run.json", {"config_hash": "h", "started": 1.0, "command": "c"})
    program = (
        "import sys; from pathlib import Path; from common.ledger import claim\n"
        "with claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert find_unfinished(tmp_path, "h") is None
        with pytest.raises(ConfigError, match="in use"), claim(tmp_path / "a"):
            pass
        holder.kill()
    assert find_unfinished(tmp_path, "h") == tmp_path / "a"


def test_interrupt_that_lightning_turned_into_an_exit_is_one_again(tmp_path: Path) -> None:
    """Oracle: the exception type; a plain exit stays an exit."""

    def interrupted(settings: Any, run: Run) -> Outcome:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    def leaving(settings: Any, run: Run) -> Outcome:
        sys.exit(3)

    with pytest.raises(KeyboardInterrupt):
        perform(_run(tmp_path), interrupted, None)
    with pytest.raises(SystemExit):
        perform(_run(tmp_path), leaving, None)


def test_undeclared_metric_is_a_defect(tmp_path: Path) -> None:
    """Oracle: no summary is written under a name nobody declared."""
    with pytest.raises(KeyError, match="not declared"):
        perform(_run(tmp_path), lambda *_: Outcome(metrics={"no/such_metric": 1.0}), None)
    assert not (tmp_path / ledger.SUMMARY_FILE).exists()
