"""Commands under Hydra: directories, resume, sweeps, and configuration errors as one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.cli import COMMANDS
from common.errors import DataError
from common.runs import Outcome, Run, _run_directory, hydra_command

Body = Callable[[Any, Run], Outcome]


@pytest.fixture
def doctor(lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs a body as ``lipllm doctor ARGS...``."""

    def go(body: Body, *arguments: str) -> Any:
        module: Any = ModuleType("fake_command")
        module.main = hydra_command("doctor", body)
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(COMMANDS, "doctor", ("fake_command:main", ""))
        return lipllm("doctor", *arguments)

    return go


def _fine(cfg: Any, run: Run) -> Outcome:
    return Outcome(objective=float(cfg.seed))


def _failing(cfg: Any, run: Run) -> Outcome:
    raise DataError(f"seed={cfg.seed}: expected another; change it")


def _directories(parent: str = "runs/doctor") -> list[Path]:
    return sorted(path for path in Path(parent).glob("*") if path.is_dir())


def test_last_line_names_the_summary(doctor: Callable[..., Any]) -> None:
    """Oracle: the file it names is the summary of this command."""
    done = doctor(_fine)
    assert done.status == 0
    label, _, path = done.out.splitlines()[-1].partition(": ")
    assert label == "summary"
    assert json.loads(Path(path).read_text())["command"] == "doctor"
    assert Path(path).parent.parent.parent.name == "runs"


def test_body_gets_its_directory_and_resolved_configuration(doctor: Callable[..., Any]) -> None:
    """Oracle: the overrides given; the configuration cannot be changed."""
    seen: list[Run] = []

    def body(cfg: Any, run: Run) -> Outcome:
        seen.append(run)
        with pytest.raises(Exception, match="read-only"):
            cfg.seed = 3
        return Outcome()

    assert doctor(body, "seed=7", "name=x").status == 0
    assert (seen[0].config["seed"], seen[0].config["name"]) == (7, "x")
    assert seen[0].directory.is_dir()
    assert not seen[0].resumed


def test_infinite_setting_is_recorded(doctor: Callable[..., Any]) -> None:
    """Oracle: JSON without infinities; the body gets the number."""

    def body(cfg: Any, run: Run) -> Outcome:
        assert cfg.tau == float("inf")
        return Outcome()

    assert doctor(body, "+tau=inf").status == 0
    record = (_directories()[0] / "run.json").read_text()
    assert json.loads(record, parse_constant=pytest.fail)["config"]["tau"] == "inf"


def test_finished_runs_are_not_reused(doctor: Callable[..., Any]) -> None:
    """Oracle: two directories after two runs, also within one second."""
    doctor(_fine)
    doctor(_fine)
    assert len(_directories()) == 2


def test_interrupted_run_is_continued_in_its_directory(doctor: Callable[..., Any]) -> None:
    """Oracle: one directory; ``resumed`` is set for the same settings only."""
    seen: list[tuple[int, bool]] = []

    def body(cfg: Any, run: Run) -> Outcome:
        seen.append((cfg.seed, run.resumed))
        if not run.resumed:
            raise KeyboardInterrupt
        return Outcome()

    assert doctor(body, "seed=1").status == 130
    assert doctor(body, "seed=2").status == 130
    assert doctor(body, "seed=1").status == 0
    assert seen == [(1, False), (2, False), (1, True)]
    assert len(_directories()) == 2


def test_force_starts_afresh(doctor: Callable[..., Any]) -> None:
    """Oracle: a second directory beside the interrupted one."""

    def body(cfg: Any, run: Run) -> Outcome:
        assert not run.resumed
        raise KeyboardInterrupt

    doctor(body)
    doctor(body, "force=true")
    assert len(_directories()) == 2


def test_failing_run_leaves_nothing(doctor: Callable[..., Any]) -> None:
    """Oracle: one line on standard error, status 2, no directory."""
    done = doctor(_failing, "seed=3")
    assert done.status == 2
    assert done.err == "lipllm: error: seed=3: expected another; change it\n"
    assert _directories() == []


def test_failing_run_keeps_what_it_wrote(doctor: Callable[..., Any]) -> None:
    """Oracle: the file of the body, and no summary."""

    def body(cfg: Any, run: Run) -> Outcome:
        (run.directory / "weights").touch()
        return _failing(cfg, run)

    assert doctor(body).status == 2
    [directory] = _directories()
    assert (directory / "weights").exists()
    assert not (directory / "summary.json").exists()


def test_fixed_directory_is_skipped_when_finished(doctor: Callable[..., Any]) -> None:
    """Oracle: the number of calls; other settings are refused, force repeats."""
    calls: list[int] = []

    def body(cfg: Any, run: Run) -> Outcome:
        calls.append(cfg.seed)
        return Outcome()

    assert doctor(body, "hydra.run.dir=here").status == 0
    again = doctor(body, "hydra.run.dir=here")
    assert (again.status, calls) == (0, [0])
    assert "already finished" in again.out
    refused = doctor(body, "hydra.run.dir=here", "seed=1")
    assert (refused.status, calls) == (2, [0])
    assert "other settings" in refused.err
    assert doctor(body, "hydra.run.dir=here", "force=true").status == 0
    assert calls == [0, 0]


def test_unwritable_folder_is_one_line(doctor: Callable[..., Any]) -> None:
    """Oracle: a file where a folder should be made stops every user, root included."""
    Path("runs").touch()
    done = doctor(_fine)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "cannot write a run directory" in done.err


def test_unwritable_log_is_one_line(doctor: Callable[..., Any]) -> None:
    """Oracle: a folder in the place of the log file stops every user, root included."""
    Path("here/doctor.log").mkdir(parents=True)
    done = doctor(_fine, "hydra.run.dir=here")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "doctor.log: cannot write a run directory" in done.err


def test_full_disk_is_one_line(doctor: Callable[..., Any]) -> None:
    """Oracle: the device that is always full."""

    def body(cfg: Any, run: Run) -> Outcome:
        with Path("/dev/full").open("w") as file:
            file.write("x")
        return Outcome()

    done = doctor(body)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "the disk is full" in done.err


def test_sweep_goes_on_after_a_failing_job(doctor: Callable[..., Any]) -> None:
    """Oracle: summaries of the good cells, one line per bad one, status 2."""

    def body(cfg: Any, run: Run) -> Outcome:
        if cfg.seed == 2:
            raise ZeroDivisionError("defect")
        return _failing(cfg, run) if cfg.seed == 3 else _fine(cfg, run)

    done = doctor(body, "-m", "seed=1,2,3,4", "hydra.sweep.dir=sweep")
    assert done.status == 2
    assert [p.parent.name for p in sorted(Path("sweep").glob("*/summary.json"))] == [
        "seed=1",
        "seed=4",
    ]
    lines = [line for line in done.err.splitlines() if line.startswith("lipllm: error: ")]
    assert len(lines) == 2
    assert lines[1] == "lipllm: error: seed=3: seed=3: expected another; change it"
    assert done.out.splitlines()[-1] == f"sweep: {Path('sweep').resolve()}"


def test_cells_are_single_folders(doctor: Callable[..., Any]) -> None:
    """Oracle: one folder per cell, whatever its overrides contain and however long they are."""
    long = "x" * 300
    done = doctor(_fine, "-m", f"name=a/b,{long}1,{long}2", "seed=1", "hydra.sweep.dir=sweep")
    assert done.status == 0
    cells = sorted(path.parent.relative_to("sweep") for path in Path("sweep").rglob("summary.json"))
    assert len(cells) == 3
    assert all(len(cell.parts) == 1 for cell in cells)
    assert Path("name=a_b,seed=1") in cells


def test_sweep_started_again_does_what_is_left(doctor: Callable[..., Any]) -> None:
    """Oracle: the seeds that ran the second time."""
    calls: list[int] = []

    def body(cfg: Any, run: Run) -> Outcome:
        calls.append(cfg.seed)
        return _failing(cfg, run) if cfg.seed == 2 and len(calls) < 3 else _fine(cfg, run)

    arguments = ("-m", "seed=1,2", "hydra.sweep.dir=sweep")
    assert doctor(body, *arguments).status == 2
    assert doctor(body, *arguments).status == 0
    assert calls == [1, 2, 2]


def test_failures_of_an_earlier_sweep_are_not_told_again(doctor: Callable[..., Any]) -> None:
    """Oracle: the folder is shared, the failing cell is not part of the second sweep."""

    def body(cfg: Any, run: Run) -> Outcome:
        return _failing(cfg, run) if cfg.seed == 2 else _fine(cfg, run)

    assert doctor(body, "-m", "seed=2", "hydra.sweep.dir=sweep").status == 2
    again = doctor(body, "-m", "seed=1", "hydra.sweep.dir=sweep")
    assert (again.status, again.err) == (0, "")


def test_interrupted_sweep_resumes_where_it_stopped(doctor: Callable[..., Any]) -> None:
    """Oracle: seeds and ``resumed`` of both starts: done is skipped, the open cell continues."""
    calls: list[tuple[int, bool]] = []

    def body(cfg: Any, run: Run) -> Outcome:
        calls.append((cfg.seed, run.resumed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return _fine(cfg, run)

    arguments = ("-m", "seed=1,2,3", "hydra.sweep.dir=sweep")
    assert doctor(body, *arguments).status == 130
    assert doctor(body, *arguments).status == 0
    assert calls == [(1, False), (2, False), (2, True), (3, False)]


def test_worker_rank_writes_no_bookkeeping(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files of a further rank; it learns from the leader whether to resume."""
    seen: list[Run] = []

    def body(cfg: Any, run: Run) -> Outcome:
        seen.append(run)
        return Outcome()

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LIPLLM_RESUMED", "1")
    assert doctor(body, "hydra.run.dir=here", "hydra.output_subdir=null").status == 0
    assert seen[0].resumed
    assert [p.name for p in Path("here").iterdir() if p.suffix != ".log"] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["sead=1"], "unknown key 'sead': did you mean seed?"),
        (["hydra.rum.dir=x"], "unknown key 'hydra.rum.dir'"),
        (["=x"], "expected key=value"),
        (["hydra=nope"], "hydra=nope: expected one of"),
        (["name=${nowhere}"], "nowhere"),
        (["seed=???"], "seed is not set: add seed=VALUE"),
        (["--config-name=nope"], "nope"),
        (["hydra=null"], "overrides cannot be applied"),
        (["--seed", "3"], "unknown option '--seed': settings are written key=value"),
        (["~seed"], "~seed: this command needs that key"),
        (["seed=x"], "seed='x': expected int"),
        (["seed=-1"], "seed=-1: expected 0 to"),
        (["force=maybe"], "force='maybe': expected bool"),
    ],
)
def test_configuration_errors_are_one_line(
    doctor: Callable[..., Any], arguments: list[str], text: str
) -> None:
    """Oracle: the offending key or value and a remedy in one line; nothing is written."""
    done = doctor(_fine, *arguments)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert text in done.err
    assert _directories() == []


def test_two_runs_of_one_second_get_their_own_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a second process that chooses before the first has written anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    root = OmegaConf.create({"seed": 0})
    chosen = [_run_directory("train", _root_=root) for _ in range(2)]
    assert chosen == ["runs/train/now", "runs/train/now-1"]
