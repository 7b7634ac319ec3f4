"""Declared metric names, loggers, and the dashboard as data.

W&B is offline unless asked otherwise: no account, no network, and everything it writes stays in
the run directory. The CSV file is what reports and tests read.
"""

import dataclasses
import difflib
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from common.config import check_types, one_of
from common.errors import BackendError, ConfigError
from common.metric_names import FAMILIES, METRICS, STAGE_PREFIXES

__all__ = ["DASHBOARD", "FAMILIES", "METRICS", "LoggerConfig", "build_loggers", "check_name"]

KINDS = ("csv", "wandb")


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


def check_name(name: str) -> str:
    """Return ``name`` when it is declared.

    Raises:
        ConfigError: otherwise, with the nearest declared names.
    """
    if is_declared(name):
        return name
    near = difflib.get_close_matches(name, [*METRICS, *FAMILIES], n=3)
    hint = f"near: {', '.join(near)}" if near else "see common/metric_names.py"
    raise ConfigError(f"metric {name!r} is not declared ({hint}); declare it or correct the name")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoggerConfig:
    """Where metrics go.

    Attributes:
        kinds: Any of ``csv`` (``metrics.csv`` in the run directory) and ``wandb``.
        mode: ``offline`` (files below the run directory; upload them with ``wandb sync``) or
            ``online`` (needs a login).
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


def _wandb_logger(config: LoggerConfig, directory: Path, run: Any) -> Any:
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger
        from lightning.pytorch.utilities import rank_zero_only
    except ImportError:
        raise BackendError("logger=wandb needs wandb: pip install wandb, or logger=csv") from None
    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(project=config.project, save_dir=directory)
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
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=experiment, save_dir=directory)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One chart: a title and the metrics in it; a name ending in ``/`` stands for its family.

    Attributes:
        title: Heading.
        metrics: Metric names; the first is the vertical axis of a scatter plot.
        kind: ``line`` over steps, ``scalar`` (last value), or ``scatter`` of runs.
    """

    title: str
    metrics: tuple[str, ...]
    kind: str = "line"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


def _panel(title: str, *metrics: str, kind: str = "line") -> Panel:
    return Panel(title=title, metrics=metrics, kind=kind)


DASHBOARD: tuple[Section, ...] = (
    Section(
        title="Training",
        panels=(
            _panel("Loss, nats per token", "train/loss", "train/val_loss_nats"),
            _panel("Validation, bits per byte", "train/val_bits_per_byte"),
            _panel("Learning rate", "train/lr"),
            _panel("Tokens per second", "train/tokens_per_s"),
        ),
    ),
    Section(
        title="Proof during training",
        panels=(
            _panel("Sound bound, decimal logarithm", "train/log10_bound_naive"),
            _panel("Largest weight norm", "train/max_norm"),
            _panel("Weight norms", "train/norm/"),
            _panel("Largest activation (estimate)", "train/max_activation"),
        ),
    ),
    Section(
        title="Certificate",
        panels=(
            _panel("Proved bound", "cert/tightened", kind="scalar"),
            _panel("Bound from norms", "cert/naive", kind="scalar"),
            _panel("Best attack (estimate)", "cert/attack", kind="scalar"),
            _panel("Bits per byte against proved bound", "train/val_bits_per_byte",
                   "cert/tightened", kind="scatter"),
        ),
    ),
    Section(
        title="Pruning",
        panels=(
            _panel("Bits per byte against removed share", "compress/val_bits_per_byte",
                   "compress/removed_fraction", kind="scatter"),
            _panel("Proved deviation against removed share", "compress/certified_deviation",
                   "compress/removed_fraction", kind="scatter"),
            _panel("Measured deviation", "compress/measured_deviation", kind="scalar"),
        ),
    ),
    Section(
        title="Serving",
        panels=(
            _panel("KL against kept share", "serve/kl_vs_full", "serve/kv_kept_fraction",
                   kind="scatter"),
            _panel("Tokens per second", "serve/tokens_per_s", kind="scalar"),
            _panel("Proved deviation", "serve/certified_deviation", kind="scalar"),
        ),
    ),
)  # fmt: skip


def build_workspace(entity: str, project: str, name: str = "lipllm") -> Any:
    """Return ``DASHBOARD`` as a W&B workspace; building needs no network, ``save()`` a login.

    Raises:
        BackendError: when ``wandb-workspaces`` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise BackendError(
            "dashboards need wandb-workspaces: pip install 'lipllm[dashboards]'"
        ) from None

    def draw(panel: Panel) -> Any:
        if panel.kind == "scalar":
            return reports.ScalarChart(title=panel.title, metric=panel.metrics[0])
        if panel.kind == "scatter":
            y, x = (reports.SummaryMetric(metric) for metric in panel.metrics)
            return reports.ScatterPlot(title=panel.title, x=x, y=y)
        families = [metric for metric in panel.metrics if metric.endswith("/")]
        if families:
            return reports.LinePlot(title=panel.title, x="Step", metric_regex=f"^{families[0]}.*")
        return reports.LinePlot(title=panel.title, x="Step", y=list(panel.metrics))

    sections = [
        workspaces.Section(
            name=section.title, panels=[draw(panel) for panel in section.panels], is_open=True
        )
        for section in DASHBOARD
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)
