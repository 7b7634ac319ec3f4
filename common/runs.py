"""From a function to a command: Hydra around it, a run directory under it, a summary after it."""

import hashlib
import logging
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from common.cli import TRACE_VARIABLE
from common.config import check_types, within
from common.errors import ConfigError
from common.explain import explain
from common.ledger import (
    RESUMED_VARIABLE,
    RUN_FILE,
    Body,
    Finished,
    Outcome,
    Run,
    call,
    config_hash,
    find_unfinished,
    is_worker_rank,
    perform,
)

__all__ = ["Outcome", "Run", "SweepReport", "hydra_command", "plain"]

ERROR_FILE = "error.txt"

# Their directory is called what key ``name`` says, so that the same name continues.
_NAMED = ("pipeline",)
_NAME_LIMIT = 180  # file systems stop at 255 bytes


def hydra_command(config_name: str, body: Body, *, shared: bool = False) -> Callable[[], int]:
    """Make a command of ``body``.

    Args:
        config_name: Primary configuration in ``conf``; also the command's name.
        body: ``body(cfg, run) -> Outcome``; ``cfg`` is read-only.
        shared: Whether the run directory is meant to be used again with other settings.

    Returns:
        A function of no arguments that reads ``sys.argv``, composes the configuration, runs the
        body once or (``-m``) for each sweep cell, and returns the exit status. Errors of a single
        run are raised; those of sweep cells are reported at the end (exit status 2).
    """

    def main() -> int:
        # Without this Hydra prints its own account of an error and exits.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        # A reader that went away (| head) must not turn each log line into a traceback.
        logging.raiseExceptions = False
        failures: list[BaseException] = []
        SweepReport.failed = 0

        def job(cfg: DictConfig) -> float | None:
            try:
                return _run_job(config_name, body, cfg, shared=shared)
            except Exception as error:
                _record_failure(error, failures)
                return float("nan")

        wrapped = hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)
        try:
            wrapped(job)()
        except (HydraException, OmegaConfBaseException, BrokenPipeError):
            raise
        except (OSError, ValueError) as error:
            # The job's own errors are in ``failures``: these are of Hydra, before the job.
            raise _before_the_job(error) from error
        if failures:
            raise failures[0]
        return 2 if SweepReport.failed else 0

    return main


@dataclass(frozen=True, kw_only=True, slots=True)
class _SharedKeys:
    """The keys that every command has, for their types."""

    seed: int = 0
    device: str = "auto"
    name: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_types(self, prefix="")
        within("seed", self.seed, 0, 2**63 - 1)


def _before_the_job(error: Exception) -> ConfigError:
    # A log file that cannot be opened arrives as a ValueError about its handler.
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        place = cause.filename or "output"
        return ConfigError(
            f"{place}: cannot write a run directory ({cause.strerror}): choose "
            "another with hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep"
        )
    return ConfigError(f"the overrides cannot be applied: {error}; correct them")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as resolved plain containers.

    Raises:
        ConfigError: if a mandatory value is not set or a reference leads nowhere.
    """
    try:
        content: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error) or str(error)) from error
    return dict(content)


def _run_job(command: str, body: Body, cfg: DictConfig, *, shared: bool) -> float | None:
    directory = Path(HydraConfig.get().runtime.output_dir)
    config = plain(cfg)
    _SharedKeys(**{key: config[key] for key in _SharedKeys.__slots__ if key in config})
    OmegaConf.set_readonly(cfg, True)
    run = Run(
        command=command,
        directory=directory,
        config=config,
        config_hash=config_hash(config),
        resumed=os.environ.get(RESUMED_VARIABLE) == "1",
    )
    if is_worker_rank():
        return call(run, body, cfg).objective
    _share_with_ranks(directory)
    (directory / ERROR_FILE).unlink(missing_ok=True)
    finished = perform(run, body, cfg, force=bool(config.get("force")), shared=shared)
    _print_end(finished)
    return finished.objective


def _share_with_ranks(directory: Path) -> None:
    # Rank processes are started with hydra.run.dir=<this value>; it must not be computed again.
    hydra_config: Any = HydraConfig.instance().cfg
    if hydra_config is not None and hydra_config.hydra.mode == RunMode.RUN:
        with read_write(hydra_config.hydra):
            hydra_config.hydra.run.dir = str(directory)


def _print_end(finished: Finished) -> None:
    sys.stdout.write(f"summary: {finished.path}\n")
    sys.stdout.flush()


def _record_failure(error: Exception, failures: list[BaseException]) -> None:
    directory = Path(HydraConfig.get().runtime.output_dir)
    line = explain(error)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        if line is not None:
            _discard(directory)
        failures.append(error)
        return
    if line is None or os.environ.get(TRACE_VARIABLE) == "1":
        traceback.print_exception(error)
    (directory / ERROR_FILE).write_text(line or f"{type(error).__name__}: {error}", "utf-8")


def _discard(directory: Path) -> None:
    """Remove a run directory in which nothing but bookkeeping was written."""
    names = {path.name for path in directory.iterdir()}
    if all(n in (RUN_FILE, ".hydra") or n.endswith(".log") for n in names):
        shutil.rmtree(directory, ignore_errors=True)


class SweepReport(Callback):
    """Says at the end of a sweep where it is and which of its jobs failed.

    Jobs may have run in other processes, so failures are read from the cells' directories.
    """

    failed = 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print one line per failed job and the sweep's directory."""
        sweep = Path(config.hydra.sweep.dir).resolve()
        # A folder that is used again may hold failures of cells that were not asked for now.
        settings = sweep / "multirun.yaml"
        start = settings.stat().st_mtime_ns if settings.exists() else 0
        errors = sorted(p for p in sweep.rglob(ERROR_FILE) if p.stat().st_mtime_ns >= start)
        SweepReport.failed = len(errors)
        for path in errors:
            cell = path.parent.relative_to(sweep).as_posix()
            sys.stderr.write(f"lipllm: error: {cell}: {path.read_text('utf-8')}\n")
        sys.stdout.write(f"sweep: {sweep}\n")
        sys.stdout.flush()


def _run_directory(command: str, *, _root_: DictConfig) -> str:
    """Resolve ``hydra.run.dir``: an unfinished run of the same settings, or a new directory."""
    parent = Path("runs") / command
    if command in _NAMED:
        return _named_directory(parent, _root_.get("name"))
    config = _known_part(_root_)
    unfinished = None if config.get("force") else find_unfinished(parent, config_hash(config))
    if unfinished is not None:
        return str(unfinished)
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = [stamp, *(f"{stamp}-{count}" for count in range(1, 1000))]
    return str(next((parent / name for name in names if _is_new(parent / name)), parent / stamp))


def _named_directory(parent: Path, name: Any) -> str:
    path = Path(str(name))
    if name is None or not path.parts or path.is_absolute() or ".." in path.parts:
        raise ConfigError(
            f"name={name}: expected a folder's name below {parent}; for any other place use "
            "hydra.run.dir=DIR"
        )
    return str(parent / path)


def _is_new(directory: Path) -> bool:
    """Make the directory, so that no other process can choose it; an unwritable place is "new"."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError:
        return True  # Hydra makes it next and says what is wrong
    return True


def _known_part(root: DictConfig) -> dict[str, Any]:
    # Hydra's own node is left out: it contains the very value that is being resolved.
    config = {}
    for key in root:
        if key != "hydra" and not OmegaConf.is_missing(root, str(key)):
            node = root[key]
            is_container = OmegaConf.is_config(node)
            config[str(key)] = OmegaConf.to_container(node, resolve=True) if is_container else node
    return config


def _cell_directory(overrides: str) -> str:
    """Resolve ``hydra.sweep.subdir``: one folder per cell, named by its overrides."""
    name = re.sub(r"[/\s]+", "_", overrides) or "defaults"
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return name if len(name) <= _NAME_LIMIT else f"{name[:_NAME_LIMIT]}-{digest}"


OmegaConf.register_new_resolver("run_directory", _run_directory, replace=True)
OmegaConf.register_new_resolver("cell_directory", _cell_directory, replace=True)
