"""What a report reads: runs, their summaries and the files that stages leave for it.

Reading never fails on a missing or damaged file: a report says what it did not find.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from common.errors import DataError
from common.metrics_file import METRICS_FILE, read_metrics

SUMMARY, RECORD, ERROR = "summary.json", "run.json", "error.txt"
OVERRIDES = Path(".hydra") / "overrides.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRun:
    """One finished or unfinished run.

    Attributes:
        name: Stage name within a pipeline, or the command's name.
        directory: Where it ran.
        summary: Content of ``summary.json``; empty when unfinished.
        record: Content of ``run.json``: command, config, config hash, start.
        overrides: Command-line settings, ``key=value``.
    """

    name: str
    directory: Path
    summary: dict[str, Any]
    record: dict[str, Any]
    overrides: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Declared metrics with a finite value."""
        found = self.summary.get("metrics") or {}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    @property
    def status(self) -> str:
        """``finished``, ``failed: REASON`` or ``unfinished`` (running or interrupted)."""
        if self.summary:
            return "finished"
        try:
            lines = (self.directory / ERROR).read_text("utf-8").strip().splitlines()
        except (OSError, ValueError):
            return "unfinished"
        return f"failed: {lines[0] if lines else 'no reason recorded'}"

    @property
    def command(self) -> str:
        """Which command ran; for a run that left nothing, its stage name."""
        return str(self.record.get("command") or self.summary.get("command") or self.name)

    @property
    def command_line(self) -> str:
        """The command as it can be typed again."""
        return " ".join(["lipllm", self.command, *(shlex.quote(text) for text in self.overrides)])

    def artifact(self, name: str) -> Path | None:
        """Return the path of an artifact, or None."""
        relative = (self.summary.get("artifacts") or {}).get(name)
        return None if relative is None else (self.directory / relative).resolve()

    def json(self, name: str) -> Any:
        """Return the content of a JSON file in the run's directory, or None."""
        return read_json(self.directory / name)

    def rows(self) -> list[dict[str, float]]:
        """Return the rows of ``metrics.csv``."""
        return read_metrics(self.directory / METRICS_FILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """Everything a report tells: the stages of a pipeline, or one run.

    Attributes:
        root: The run of the pipeline itself, or the single run.
        stages: Stage name to run, in the order in which they started.
    """

    root: StageRun
    stages: dict[str, StageRun]

    def stage(self, *names: str) -> StageRun | None:
        """Return the first finished stage of these names, or None."""
        found = (self.stages.get(name) for name in names)
        return next((stage for stage in found if stage is not None and stage.summary), None)

    def items(self, stage: str, file: str) -> list[Any]:
        """Return the list in a JSON file that a finished stage left; empty where there is none."""
        run = self.stage(stage)
        content = run.json(file) if run else None
        return content if isinstance(content, list) else []

    def metric(self, name: str, *stages: str) -> float | None:
        """Return a metric of the first of ``stages`` (default: of all) that has it."""
        chosen: Iterable[str] = stages or self.stages
        for stage in (self.stages.get(key) for key in chosen):
            if stage is not None and name in stage.metrics:
                return stage.metrics[name]
        return None

    def bundle(self, *stages: str) -> Path | None:
        """Return the model directory that one of ``stages`` wrote or read, if it exists."""
        for stage in (self.stages.get(name) for name in stages):
            if stage is None:
                continue
            read = (stage.record.get("config") or {}).get("bundle")
            for path in (stage.artifact("bundle"), Path(read) if read else None):
                if path is not None and (path / "manifest.json").is_file():
                    return path
        return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_run(directory: Path, name: str | None = None) -> StageRun | None:
    """Return the run in a directory, or None when there is none."""
    summary, record = read_json(directory / SUMMARY), read_json(directory / RECORD)
    summary = summary if isinstance(summary, dict) else {}
    record = record if isinstance(record, dict) else {}
    if not summary and not record:
        return None
    command = record.get("command") or summary.get("command") or directory.name
    return StageRun(
        name=name or command,
        directory=directory,
        summary=summary,
        record=record,
        overrides=_overrides(directory),
    )


def read_story(directory: Path) -> Story:
    """Return the story of a pipeline's directory, or of a single run's.

    Raises:
        DataError: when the directory holds no run.
    """
    below = sorted(path for path in directory.glob("[!.]*") if path.is_dir())
    found = [read_run(path, path.name) for path in below if path.name != "report"]
    stages = sorted(
        (stage for stage in found if stage is not None),
        key=lambda stage: float(stage.record.get("started") or 0),
    )
    root = read_run(directory)
    if root is None and not stages:
        raise DataError(
            f"{directory}: no run in it ({SUMMARY} or {RECORD}); give the folder that a lipllm "
            "command printed as its summary"
        )
    if root is None:
        root = StageRun(name=directory.name, directory=directory, summary={}, record={})
    if not stages:
        stages = [root]
    return Story(root=root, stages={stage.name: stage for stage in stages})


def read_sweep(directory: Path) -> list[StageRun]:
    """Return the runs below a directory, in name order; runs inside a run are its stages.

    Cells that failed or are unfinished are among them; see ``StageRun.status``.

    Raises:
        DataError: when there is no directory or no run in it.
    """
    if not directory.is_dir():
        raise DataError(f"sweep={directory}: no such directory; give a folder with runs")
    folders = {path.parent for name in (SUMMARY, RECORD, ERROR) for path in directory.rglob(name)}
    folders |= {path.parents[1] for path in directory.rglob(str(OVERRIDES))}
    runs = []
    for folder in sorted(folders):
        is_stage = any(outer in folders for outer in folder.parents if directory in outer.parents)
        run = None if is_stage else _read_cell(folder)
        if run is not None and "report" not in (
            run.summary.get("command"),
            run.record.get("command"),
        ):
            runs.append(run)
    if not runs:
        raise DataError(
            f"sweep={directory}: no {SUMMARY} below it; give the folder that lipllm ... -m printed"
        )
    return runs


def _read_cell(folder: Path) -> StageRun:
    # A cell that failed early has left nothing but its settings and the reason.
    found = read_run(folder)
    if found is not None:
        return found
    return StageRun(
        name=folder.name, directory=folder, summary={}, record={}, overrides=_overrides(folder)
    )


def _overrides(directory: Path) -> tuple[str, ...]:
    # A YAML list of plain strings, written by Hydra.
    try:
        content = yaml.safe_load((directory / OVERRIDES).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ()
    return tuple(str(item) for item in content) if isinstance(content, list) else ()
