"""Command ``bench``: cache policies and decoding speed, side by side, in one resumable table."""

import sys
from typing import Any

import torch
from omegaconf import DictConfig

from common.config import build
from common.device import resolve_device
from common.errors import ConfigError
from common.reporting.bench import PARTS, note, text_table
from common.runs import Outcome, Run, hydra_command
from serve.bench.baseline import CONTEXT, measure_baseline, require_context
from serve.bench.policies import usable
from serve.bench.quality import measure_quality
from serve.bench.retrieval import measure_tasks
from serve.bench.rows import FILE, Rows
from serve.bench.settings import LENGTH, BenchConfig
from serve.bench.speed import measure_speed, random_model
from serve.decoder import as_decoder
from serve.engine.config import EngineConfig
from serve.llm import make_ledger, require_tokenizer
from serve.loading import Served, load_served
from serve.texts import served_text


def bench(cfg: DictConfig, run: Run) -> Outcome:
    """Measure what ``cfg.bench`` asks for; rows that are there already are kept.

    Args:
        cfg: Keys ``bundle`` and ``kv_stats`` (for quality and tasks; speed and baseline run
            without one on random weights), ``bench``, ``data`` (held-out text, and the task whose
            questions are asked), ``device``, ``force``.
        run: Where to write.

    Returns:
        The ``bench/*`` metrics; artifact ``bench`` (JSON). The objective is the divergence of the
        best policy at the smallest budget.

    Raises:
        LipError: for anything the user can correct; nothing is measured then.
    """
    settings: BenchConfig = build(cfg.bench)
    device = resolve_device(cfg.device)
    data = _checked_data(cfg, settings)
    served = None
    if cfg.bundle is not None:
        served = load_served(cfg.bundle, device=device, stats=cfg.kv_stats)
        settings = _checked(settings, served)
    path = run.directory / FILE
    rows = Rows(path, _identity(cfg, settings, served), fresh=bool(cfg.get("force")))
    if served is not None:
        _measure_answers(settings, rows, served, data)
    if "speed" in settings.parts:
        longest = max(context for context, _ in settings.shapes())
        model = served.model if served else random_model(settings.model, longest, device)
        measure_speed(rows, settings, model)
    if "baseline" in settings.parts:
        model = served.model if served else random_model(settings.model, CONTEXT, device)
        measure_baseline(rows, settings, model)
    _print(rows)
    metrics = _metrics(rows)
    return Outcome(
        metrics=metrics, artifacts={"bench": path}, objective=metrics.get("bench/best_kl")
    )


def _checked_data(cfg: DictConfig, settings: BenchConfig) -> Any:
    """Return the data configuration, which must go with the parts."""
    needs_bundle = {"quality", "tasks"} & set(settings.parts)
    if needs_bundle and cfg.bundle is None:
        raise ConfigError(
            f"bundle=null: bench.parts={list(settings.parts)} need a model directory; set "
            "bundle=DIR, or bench.parts=[speed]"
        )
    data = build(cfg.data)
    if "tasks" in settings.parts and data.task is None:
        raise ConfigError(
            f"data.source={cfg.data.source}: bench.parts=tasks needs a task; set data=recall, "
            "or bench.parts=[quality]"
        )
    return data


def _checked(settings: BenchConfig, served: Served) -> BenchConfig:
    """Return the settings with the policies that the model allows, and its shapes checked."""
    require_tokenizer(served)
    context = as_decoder(served.model).context
    settings.shapes(context)
    if "baseline" in settings.parts:
        require_context(context)
    return usable(settings, served)


def _measure_answers(settings: BenchConfig, rows: Rows, served: Served, data: Any) -> None:
    if "quality" in settings.parts:
        length = min(settings.length or LENGTH, as_decoder(served.model).context)
        windows_NT = served_text(data, served).windows("val", length, settings.windows)
        ledger = make_ledger(served, served.model, EngineConfig())
        measure_quality(rows, settings, served, windows_NT.to(torch.int64), ledger)
    if "tasks" in settings.parts:
        measure_tasks(rows, settings, served, data.task)


def _identity(cfg: DictConfig, settings: BenchConfig, served: Served | None) -> dict[str, Any]:
    """Return what all rows depend on: more policies, budgets and batches may be added later."""
    from omegaconf import OmegaConf

    names = ("windows", "length", "examples", "steps", "rounds", "model")
    return {
        # The weights, not the folder: another training may have written there since.
        "bundle": None if served is None else served.fingerprint,
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
    for part in PARTS:
        heads, lines = text_table(list(rows), part)
        if lines:
            table: Any = Table(*heads, box=None, pad_edge=False, title=part, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)
    if text := note(list(rows)):
        console.print(text)


main = hydra_command("bench", bench, shared=True)
