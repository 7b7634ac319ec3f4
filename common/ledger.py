"""What a run directory records: who runs in it, with which settings, and how it ended.

``run.json`` is written at the start and identifies the run; ``summary.json`` is written last, so
that its presence means "finished". Nothing here knows Hydra.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_json

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"

# Keys that change where or how a run reports, never what it computes.
NON_SEMANTIC_KEYS = frozenset({"hydra", "logger", "force", "name"})

RESUMED_VARIABLE = "LIPLLM_RESUMED"

_VERSIONED = ("lipllm", "torch", "triton", "lightning", "hydra-core", "numpy", "safetensors")


@dataclass(kw_only=True, slots=True)
class Run:
    """One execution of a command, as its body sees it.

    Attributes:
        command: Name of the command or pipeline stage.
        directory: Absolute path that this run owns; it exists.
        config: The resolved configuration as plain containers.
        config_hash: SHA-256 (hex) of what determines the result.
        resumed: Whether an unfinished run with the same hash left files in ``directory``.
    """

    command: str
    directory: Path
    config: dict[str, Any]
    config_hash: str
    resumed: bool = False


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What a command hands back.

    Attributes:
        metrics: Declared metric name to value.
        artifacts: Name to path of what was written.
        objective: The number a sweeper minimises or maximises, if there is one.
        notes: Name to a sentence for people.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)
    objective: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


Body = Callable[[Any, Run], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A run that has a summary.

    Attributes:
        path: The summary file.
        summary: Its content.
        objective: See ``Outcome``.
        skipped: Whether an earlier run had produced it.
    """

    path: Path
    summary: dict[str, Any]
    objective: float | None
    skipped: bool = False


def config_hash(
    config: Mapping[str, Any], *, keys: Collection[str] | None = None, inputs: Collection[str] = ()
) -> str:
    """Return the SHA-256 (hex) of what determines a result.

    Args:
        config: Resolved configuration as plain containers.
        keys: Top-level keys to include; all but the non-semantic ones when omitted.
        inputs: Fingerprints of what the run reads besides its configuration.
    """
    chosen = set(config) if keys is None else set(keys) & set(config)
    semantic = {key: config[key] for key in sorted(chosen - NON_SEMANTIC_KEYS)}
    text = json.dumps([semantic, list(inputs)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in ``path``, or None if it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the system lets go of it however the process ends.

    Raises:
        ConfigError: if another process holds it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(
            f"{directory} is in use by another process: wait for it or choose another "
            "hydra.run.dir (or name, for a pipeline)"
        ) from None
    finally:
        os.close(handle)


def find_unfinished(parent: Path, digest: str) -> Path | None:
    """Return the newest unfinished and unused run in ``parent`` whose config hash is ``digest``."""
    found = []
    for record_path in parent.glob(f"*/{RUN_FILE}"):
        directory, record = record_path.parent, read_json(record_path)
        if record is None or record.get("config_hash") != digest:
            continue
        if not (directory / SUMMARY_FILE).exists() and _is_free(directory):
            found.append((record.get("started", 0.0), directory))
    return max(found, default=(0.0, None))[1]


def _is_free(directory: Path) -> bool:
    try:
        with claim(directory):
            return True
    except (ConfigError, OSError):
        return False


def perform(
    run: Run, body: Body, settings: Any, *, force: bool = False, shared: bool = False
) -> Finished:
    """Run ``body`` in its directory, or hand back what an identical finished run left there.

    Args:
        run: Which run; ``resumed`` is set here.
        body: The command.
        settings: What the body gets as configuration.
        force: Run again even if finished.
        shared: Whether runs with other settings may have used the directory before.

    Returns:
        The finished run.

    Raises:
        ConfigError: if the directory is in use, or holds a run with other settings.
    """
    with claim(run.directory):
        record = read_json(run.directory / RUN_FILE) or {}
        same = record.get("config_hash") == run.config_hash and record["command"] == run.command
        summary = read_json(run.directory / SUMMARY_FILE)
        reusable = same and not force and not shared
        if summary is not None and reusable and _is_complete(run.directory, summary):
            log.info(
                "%s: already finished in %s; force=true repeats it", run.command, run.directory
            )
            return Finished(
                path=run.directory / SUMMARY_FILE,
                summary=summary,
                objective=record.get("objective"),
                skipped=True,
            )
        if record and not (same or force or shared):
            raise ConfigError(
                f"{run.directory} holds a {record.get('command')} run with other settings: "
                "choose another hydra.run.dir, or force=true to overwrite it"
            )
        run.resumed = same and not force
        if run.resumed and not shared:
            log.info("%s: resuming in %s", run.command, run.directory)
        return _execute(run, body, settings)


def _is_complete(directory: Path, summary: Mapping[str, Any]) -> bool:
    return all((directory / path).exists() for path in summary.get("artifacts", {}).values())


def _execute(run: Run, body: Body, settings: Any) -> Finished:
    (run.directory / SUMMARY_FILE).unlink(missing_ok=True)
    record = {
        "command": run.command,
        "config_hash": run.config_hash,
        "started": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "config": _finite(run.config),
    }
    write_json(run.directory / RUN_FILE, record)
    os.environ[RESUMED_VARIABLE] = "1" if run.resumed else "0"
    clock = time.monotonic()
    outcome = call(run, body, settings)
    summary = {
        "command": run.command,
        "status": "finished",
        "metrics": _checked_metrics(outcome.metrics),
        "artifacts": {
            name: Path(os.path.relpath(path, run.directory)).as_posix()
            for name, path in outcome.artifacts.items()
        },
        "config_hash": run.config_hash,
        "seconds": round(time.monotonic() - clock, 3),
        "versions": versions(),
    }
    if outcome.notes:
        summary["notes"] = outcome.notes
    write_json(run.directory / RUN_FILE, record | {"objective": _number(outcome.objective)})
    write_json(run.directory / SUMMARY_FILE, summary)
    return Finished(path=run.directory / SUMMARY_FILE, summary=summary, objective=outcome.objective)


def _number(value: float | None) -> float | None:
    # A sweep may learn that a run failed from an infinite objective; JSON cannot.
    return value if value is not None and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """Return plain containers with infinities and NaN as text, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_worker_rank() -> bool:
    """Return whether this process is a rank that another one started or leads."""
    ranks = (os.environ.get(name, "0") for name in ("LOCAL_RANK", "RANK", "NODE_RANK"))
    return any(rank not in ("", "0") for rank in ranks)


def call(run: Run, body: Body, settings: Any) -> Outcome:
    """Call the body, closing the tracker whatever happens and restoring Ctrl-C's meaning."""
    try:
        return body(settings, run)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit and mutes further ones.
        if isinstance(stop.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        raise
    finally:
        # One process is one tracked run until it is finished: sweeps would mix their jobs.
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish()


def _checked_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    if not metrics:
        return {}
    from common.tracking import is_declared

    unknown = [name for name in metrics if not is_declared(name)]
    if unknown:
        raise KeyError(f"metric names not declared in common/metric_names.py: {', '.join(unknown)}")
    # JSON has no infinities; a bound that overflowed is reported by its logarithm.
    return {k: float(v) if math.isfinite(v) else None for k, v in sorted(metrics.items())}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
