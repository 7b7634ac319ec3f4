"""``lipllm report``: one self-contained HTML file of a run, a pipeline or a sweep."""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.config import build, check_types, positive
from common.errors import ConfigError, DataError
from common.files import write_bytes
from common.ledger import Outcome, Run
from common.reporting import (
    bench,
    campaign,
    concentration,
    headline,
    origin,
    proof,
    pruning,
    robustness,
    serving,
    solving,
    study,
    training,
    unlearning,
)
from common.reporting.page import missing, page
from common.reporting.runs import Story, read_story, read_sweep
from common.reporting.sweep import Comparison, comparison
from common.runs import hydra_command

log = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_RUNS = Path("runs") / "pipeline"
EXPECTED = frozenset({"train", "certify", "attack", "compress", "calibrate", "generate"})
"""Stages whose absence the page of a pipeline tells; of others there is nothing to miss."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """How a report looks.

    Attributes:
        title: Heading; None names the run.
        samples: Text samples shown.
        workspace: ``ENTITY/PROJECT``: also save the metrics dashboard there (needs a W&B login).
    """

    title: str | None = None
    samples: int = 4
    workspace: str | None = None

    def __post_init__(self) -> None:
        """Check types and values."""
        check_types(self)
        positive("report.samples", self.samples, zero=True)
        if self.workspace is not None and self.workspace.count("/") != 1:
            raise ConfigError(f"report.workspace={self.workspace!r}: expected ENTITY/PROJECT")


def report(cfg: DictConfig, run: Run) -> Outcome:
    """Write ``report.html`` into the run directory.

    Args:
        cfg: Key ``report``; optionally ``run`` (directory of a run or pipeline) or ``sweep``
            (directory with runs). With neither, the pipeline that this stage belongs to, or the
            latest pipeline below ``runs/pipeline``.
        run: Where to write.

    Returns:
        The artifact ``report``; for a sweep also ``comparison``, the table as CSV.

    Raises:
        DataError: when there is no run to report.
    """
    settings: ReportConfig = build(cfg.report)
    path = run.directory / REPORT_FILE
    artifacts, metrics = {"report": path}, {}
    sweep = cfg.get("sweep")
    if sweep:
        cells = read_sweep(Path(str(sweep)).expanduser())
        compared = comparison(cells, settings.title or Path(str(sweep)).resolve().name)
        markup = compared.document
        artifacts["comparison"] = run.directory / "comparison.csv"
        write_bytes(artifacts["comparison"], compared.table_csv.encode())
        _print(compared)
        metrics["report/runs"] = float(len(cells))
    else:
        markup = story_page(read_story(_directory(cfg, run)), settings)
    data = markup.encode("utf-8")
    write_bytes(path, data)
    if settings.workspace is not None:
        _push(settings.workspace)
    log.info("report: %s", path)
    return Outcome(metrics={"report/bytes": float(len(data)), **metrics}, artifacts=artifacts)


def story_page(story: Story, settings: ReportConfig) -> str:
    """Return the report of a pipeline or of one run as an HTML document."""
    name = story.root.record.get("config", {}).get("name") or story.root.directory.name
    sections: dict[str, tuple[Callable[[Story], str], ...]] = {
        "train": (training.training,),
        "certify": (proof.proof,),
        "attack": (robustness.robustness,),
        "compress": (pruning.pruning,),
        "unlearn": (unlearning.unlearning,),
        "calibrate": (concentration.concentration,),
        "generate": (serving.cache, lambda story: serving.samples(story, settings.samples)),
        "study": (study.study,),
        "solve": (solving.solving,),
        "campaign": (campaign.campaign,),
        "bench": (bench.bench,),
    }
    is_pipeline = len(story.stages) > 1
    parts = [_guarded(headline.headline, story, "headline")]
    for stage, makers in sections.items():
        if stage in story.stages or (is_pipeline and stage in EXPECTED):
            parts += [_guarded(make, story, stage) for make in makers]
    parts += [_guarded(make, story, "origin") for make in (origin.timings, origin.origin)]
    about = "A model with a machine-checkable bound on its sensitivity."
    if story.root.command == solving.COMMAND:
        about = "A monotone inclusion, and how a method came to its solution."
    elif story.root.command == study.COMMAND:
        about = "Ways to prune one model, compared on the same text."
    elif story.root.command == bench.COMMAND:
        about = "Cache policies, compared on the same text, questions and machine."
    elif story.root.command == campaign.COMMAND:
        about = "Attempts to refute the proofs that certificates rest on."
    lead = f"{about} Each figure says what is proved, what is measured and what is only estimated."
    return page(settings.title or f"lipllm: {name}", lead, "\n".join(parts), _foot(story.root))


def _print(compared: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*compared.heads, box=None, pad_edge=False)
    for row in compared.rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000
    Console(file=sys.stdout, highlight=False, width=width, markup=False).print(table)


def _guarded(make: Callable[[Story], str], story: Story, name: str) -> str:
    # A stage's file of another version must not cost the rest of the report.
    try:
        return make(story)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        log.warning("report: %s left out: %s: %s", name, type(error).__name__, error)
        return missing(f"The section {name} could not be drawn: its data has another format.")


def _foot(root: Any) -> str:
    started = root.record.get("started")
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "unknown"
    return f"Run started {moment}. Written by lipllm report."


def _directory(cfg: DictConfig, run: Run) -> Path:
    chosen = cfg.get("run")
    if chosen:
        path = Path(str(chosen)).expanduser()
        if not path.is_dir():
            raise DataError(f"run={chosen}: no such directory; give a run's or pipeline's folder")
        return path
    others = (path.parent for path in run.directory.parent.glob("*/run.json"))
    if run.directory.name == run.command and any(path != run.directory for path in others):
        return run.directory.parent
    latest = max(_RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime, default=None)
    if latest is None:
        raise DataError(
            f"no pipeline below {_RUNS}; give one with run=DIR, or a sweep with sweep=DIR"
        )
    return latest.parent


def _push(workspace: str) -> None:
    from common.dashboard import build_workspace

    entity, project = workspace.split("/")
    try:
        build_workspace(entity, project).save()
    except Exception as error:  # wandb raises its own classes and plain ones
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"report.workspace={workspace}: not saved ({reason}); run wandb login"
        ) from error


main = hydra_command("report", report)
