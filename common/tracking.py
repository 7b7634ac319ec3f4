"""Declared metric names, and the loggers that write them.

W&B is offline unless asked otherwise: no account, no network, and everything it writes stays in
the run directory. The CSV file is what reports and tests read.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from common.config import check_types, one_of
from common.errors import BackendError, ConfigError
from common.metric_names import FAMILIES, METRICS, STAGE_PREFIXES
from common.metrics_file import MetricsFile

KINDS = ("csv", "wandb")

_STEP = "trainer/global_step"  # what Lightning calls it in W&B


def describe(name: str) -> str | None:
    """Return what a metric measures, or None when its name is not declared."""
    if name in METRICS:
        return METRICS[name]
    for prefix, text in FAMILIES.items():
        if name.startswith(prefix) and name != prefix:
            return f"{text}: {name.removeprefix(prefix)}"
    for prefix in STAGE_PREFIXES:
        inner = name.removeprefix(prefix)
        if inner != name and (text_ := describe(inner)) is not None:
            return f"{text_} (after {prefix.rstrip('/')})"
    return None


def is_declared(name: str) -> bool:
    """Return whether ``name`` is a declared metric or belongs to a declared family."""
    return describe(name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoggerConfig:
    """Where metrics go.

    Attributes:
        kinds: Any of ``csv`` (``metrics.csv`` in the run directory) and ``wandb``.
        mode: Of W&B: ``offline`` (files below the run directory; upload them with ``wandb sync``)
            or ``online`` (needs a login; asks for ``wandb`` by itself).
        project: W&B project.
        entity: W&B account or team; None for the default one.
        group: W&B group; None groups the runs of a sweep by the sweep's name.
        tags: W&B tags.
    """

    kinds: tuple[str, ...] = ("csv",)
    mode: Literal["offline", "online"] = "offline"
    project: str = "lipllm"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for kind in self.kinds:
            one_of("logger.kinds", kind, KINDS)
        if self.mode == "online" and "wandb" not in self.kinds:
            object.__setattr__(self, "kinds", (*self.kinds, "wandb"))


def build_loggers(config: LoggerConfig, directory: Path, run: Any) -> list[Any]:
    """Return Lightning loggers.

    Args:
        config: Which ones.
        directory: The run directory; everything is written below it.
        run: The run (``common.ledger.Run``): its command, name and configuration are recorded.

    Returns:
        Loggers; a resumed run continues its ``metrics.csv``.

    Raises:
        BackendError: when ``wandb`` is asked for and not installed.
        ConfigError: when ``logger.mode=online`` and no login is known.
    """
    loggers: list[Any] = []
    if "csv" in config.kinds:
        from common.metrics_logger import MetricsLogger

        loggers.append(MetricsLogger(directory, keep=run.resumed))
    if "wandb" in config.kinds:
        loggers.append(_wandb_logger(config, directory, run))
    return loggers


def record(config: LoggerConfig, run: Any, rows: Mapping[int, Mapping[str, float]]) -> None:
    """Write rows that are all known; without Lightning, whose import takes longer than most runs.

    Args:
        config: Where to.
        run: The run, as in :func:`build_loggers`.
        rows: Step to metrics, in order.

    Raises:
        BackendError: when ``wandb`` is asked for and not installed.
        ConfigError: when ``logger.mode=online`` and no login is known.
    """
    if "csv" in config.kinds:
        file = MetricsFile(run.directory)
        for step, row in rows.items():
            file.add(row, step)
        file.save()
    if "wandb" in config.kinds:
        experiment = _start_wandb(config, run.directory, run)
        for step, row in rows.items():
            experiment.log({_STEP: step, **row})


def _wandb_logger(config: LoggerConfig, directory: Path, run: Any) -> Any:
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(project=config.project, save_dir=directory)
    return WandbLogger(experiment=_start_wandb(config, directory, run), save_dir=directory)


def _start_wandb(config: LoggerConfig, directory: Path, run: Any) -> Any:
    try:
        import wandb
    except ImportError:
        raise BackendError("logger=wandb needs wandb: pip install wandb, or logger=csv") from None
    is_sweep = directory.parent.parent.name == "sweeps"
    identity = hashlib.sha256(f"{directory.resolve()} {run.config_hash}".encode()).hexdigest()[:16]
    try:
        # Started here rather than by Lightning, which would make later runs offline as well.
        experiment = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.config.get("name") or directory.name,
            group=config.group or (directory.parent.name if is_sweep else None),
            job_type=run.command,
            tags=config.tags,
            id=identity,
            resume="allow" if run.resumed and config.mode == "online" else None,
            dir=directory,
            mode=config.mode,
            config=run.config,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise ConfigError(
            f"logger.mode={config.mode}: W&B did not start ({reason}); run wandb login, or set "
            "logger.mode=offline"
        ) from error
    experiment.define_metric(_STEP)
    experiment.define_metric("*", step_metric=_STEP, step_sync=True)
    return experiment
