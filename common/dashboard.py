"""The W&B dashboard as data: which metrics are shown together, and as what."""

import dataclasses
from typing import Any

from common.errors import BackendError


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
