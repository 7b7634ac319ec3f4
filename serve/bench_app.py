"""Command ``bench``: cache policies and decoding speed, side by side, in one resumable table."""

import sys
from typing import Any

from omegaconf import DictConfig

from common.bundle import Bundle, load_bundle
from common.config import build
from common.corpus import prepare_corpus
from common.device import resolve_device
from common.errors import ConfigError
from common.reporting.bench import HEADS, text_rows
from common.runs import Outcome, Run, hydra_command
from serve.bench.quality import held_out, measure_quality
from serve.bench.retrieval import measure_tasks
from serve.bench.rows import FILE, Rows
from serve.bench.settings import BenchConfig
from serve.engine.config import EngineConfig
from serve.llm import make_ledger, require_tokenizer


def bench(cfg: DictConfig, run: Run) -> Outcome:
    """Measure what ``cfg.bench`` asks for; rows that are there already are kept.

    Args:
        cfg: Keys ``bundle`` (for quality and tasks), ``bench``, ``data`` (held-out text, and the
            task whose questions are asked), ``device``, ``force``.
        run: Where to write.

    Returns:
        The ``bench/*`` metrics; artifact ``bench`` (JSON). The objective is the divergence of the
        best policy at the smallest budget.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: BenchConfig = build(cfg.bench)
    device = resolve_device(cfg.device)
    path = run.directory / FILE
    if cfg.get("force"):
        path.unlink(missing_ok=True)
    needs_bundle = {"quality", "tasks"} & set(settings.parts)
    if needs_bundle and cfg.bundle is None:
        raise ConfigError(
            f"bundle=null: bench.parts={list(settings.parts)} need a model directory; set "
            "bundle=DIR, or bench.parts=[speed]"
        )
    bundle = None if cfg.bundle is None else load_bundle(cfg.bundle, device=device)
    rows = Rows(path, _identity(cfg, settings, bundle))
    if bundle is not None and needs_bundle:
        _measure_bundle(cfg, settings, rows, bundle)
    if "speed" in settings.parts:
        from serve.bench.speed import measure_speed

        measure_speed(rows, settings, device)
    if "baseline" in settings.parts:
        from serve.bench.baseline import measure_baseline

        measure_baseline(rows, settings, device)
    _print(rows)
    metrics = _metrics(rows)
    return Outcome(
        metrics=metrics, artifacts={"bench": path}, objective=metrics.get("bench/best_kl")
    )


def _measure_bundle(cfg: DictConfig, settings: BenchConfig, rows: Rows, bundle: Bundle) -> None:
    tokenizer = require_tokenizer(bundle)
    data = build(cfg.data)
    if "quality" in settings.parts:
        corpus = prepare_corpus(data, tokenizer)
        context = bundle.config.context
        length = min(settings.length or context, context)
        windows = corpus.windows("val", length, settings.windows)
        ledger = make_ledger(bundle, bundle.model, EngineConfig())
        measure_quality(rows, settings, bundle, held_out(windows, context, length), ledger)
    if "tasks" in settings.parts:
        if data.task is None:
            raise ConfigError(
                f"data.source={cfg.data.source}: bench.parts=tasks needs a task; set data=recall, "
                "or bench.parts=[quality]"
            )
        measure_tasks(rows, settings, bundle, data.task)


def _identity(cfg: DictConfig, settings: BenchConfig, bundle: Bundle | None) -> dict[str, Any]:
    """Return what all rows depend on: more policies, budgets and batches may be added later."""
    from omegaconf import OmegaConf

    names = ("windows", "length", "examples", "share", "steps", "rounds", "model")
    return {
        # The weights, not the folder: another training may have written there since.
        "bundle": None if bundle is None else bundle.fingerprint,
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "settings": {name: repr(getattr(settings, name)) for name in names},
    }


def _metrics(rows: Rows) -> dict[str, float]:
    quality = [row for row in rows if row["part"] == "quality" and row["policy"] != "full"]
    smallest = min((row["budget"] for row in quality), default=0.0)
    kl = [row["kl_vs_full"] for row in quality if row["budget"] == smallest]
    asked = [row for row in rows if row["part"] == "tasks"]
    full = [row["exact"] for row in asked if row["policy"] == "full"]
    exact = [row["exact"] for row in asked if row["policy"] != "full"]
    speed = [row["ratio"] for row in rows if row["part"] == "speed" and row["policy"] != "full"]
    baseline = [row["ratio"] for row in rows if row["part"] == "baseline"]
    metrics = {"bench/rows": float(len(list(rows)))}
    for name, values, pick in (
        ("bench/best_kl", kl, min),
        ("bench/task_exact_full", full, max),
        ("bench/task_exact", exact, max),
        ("bench/speedup", speed, max),
        ("bench/over_transformers", baseline, min),
    ):
        if values:
            metrics[name] = float(pick(values))
    return metrics


def _print(rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 1000
    console = Console(file=sys.stdout, highlight=False, width=width, markup=False)
    for part, heads in HEADS.items():
        lines = text_rows(list(rows), part)
        if lines:
            table: Any = Table(*heads, box=None, pad_edge=False, title=part, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)


main = hydra_command("bench", bench, shared=True)
