"""Command ``study``: one table of all pruning methods on one model and one text."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from common.bundle import Bundle, load_bundle
from common.config import build
from common.corpus import prepare_corpus
from common.device import resolve_device
from common.errors import ConfigError
from common.files import replace_bytes
from common.reporting.study import HEADS, text_rows
from common.runs import Outcome, Run, hydra_command
from compress.app import texts
from compress.record import check_model, require_certificate
from compress.settings import CompressConfig
from compress.study.config import StudyConfig
from compress.study.table import FILE, Study
from compress.study.verdict import growth

SHOWN = 4
"""Best rows per budget in the terminal, besides the default and the rotation."""


def study(cfg: DictConfig, run: Run) -> Outcome:
    """Measure every method at every budget on the bundle that ``cfg.bundle`` names.

    Args:
        cfg: Keys ``bundle``, ``study``, ``compress``, ``data``, ``seed``, ``device``, ``force``.
        run: Where to write; rows that are already there are kept, unless ``force``.

    Returns:
        The ``study/*`` metrics; artifacts ``study`` (JSON) and ``table`` (CSV). The objective is
        the largest gap of the default method.

    Raises:
        LipError: for anything the user can correct.
    """
    settings: StudyConfig = build(cfg.study)
    base: CompressConfig = build(cfg.compress, seed=cfg.seed, frontier=[])
    bundle = load_bundle(cfg.bundle, device=resolve_device(cfg.device))
    _check_bundle(bundle, settings)
    certificate = require_certificate(bundle)
    check_model(bundle.model, base)
    corpus = prepare_corpus(build(cfg.data), bundle.tokenizer)
    work = Study(
        bundle,
        certificate,
        settings,
        base,
        texts(corpus, bundle, base),
        corpus.bytes_per_token,
    )
    rows = run.directory / FILE
    if cfg.get("force"):
        rows.unlink(missing_ok=True)
    content = work.run(rows)
    table = run.directory / "study.csv"
    _write_csv(table, text_rows(content))
    _print(text_rows(content, most=SHOWN))
    gaps = [v["gap"] for v in content["verdicts"] if v["gap"] is not None]
    own = [p for p in content["points"] if f"{p['score']}+{p['comp']}" == work.default]
    grown = max(growth(point, content["dense"]) for point in own)
    return Outcome(
        metrics={
            "study/rows": len(content["points"]),
            "study/budgets": len(content["verdicts"]),
            "study/default_tied": sum(verdict["tied"] for verdict in content["verdicts"]),
            "study/default_gap": max(gaps, default=0.0),
            "study/certificate_growth": grown,
            "study/seconds": sum(point["seconds"] for point in content["points"]),
        },
        artifacts={"study": rows, "table": table},
        objective=max(gaps, default=0.0),
    )


def _check_bundle(bundle: Bundle, settings: StudyConfig) -> None:
    """Check what depends on settings and model together, before any work is done."""
    if bundle.kind != "transformer":
        raise ConfigError(
            f"bundle={bundle.path}: a {bundle.kind}, expected a language model; sweep a classifier "
            "with: lipllm compress -m compress.score=..."
        )
    context = bundle.config.context
    if settings.length is not None and settings.length > context:
        raise ConfigError(
            f"study.length={settings.length}: expected at most the model's context of {context}; "
            "lower it"
        )


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([HEADS, *rows])
    replace_bytes(path, buffer.getvalue().encode())


def _print(rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table: Any = Table(*HEADS, box=None, pad_edge=False)
    budget = None
    for row in rows:
        if budget not in (None, row[:2]):
            table.add_section()
        budget = row[:2]
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000
    Console(file=sys.stdout, highlight=False, width=width, markup=False).print(table)


main = hydra_command("study", study, shared=True)
