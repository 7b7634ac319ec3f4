"""Command ``campaign``: try to refute the bounds on thousands of small models."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import build
from common.errors import CertificateError, DataError
from common.runs import Outcome, Run, hydra_command
from solvers.bounds.campaign import CampaignSettings, Case, cases

log = logging.getLogger(__name__)

RECORD_FILE = "campaign.csv"
_NEWS_EVERY = 20


def campaign(cfg: Any, run: Run) -> Outcome:
    """Prove, check and attack random models; reads ``campaign``.

    Every finished model is a row of ``campaign.csv``; a run that was interrupted continues there.

    Returns:
        The ``campaign/*`` metrics; the artifact ``campaign``; the largest ratio as objective.

    Raises:
        CertificateError: after the last model, if any ratio of attack to bound is above 1.
        DataError: if the record of an interrupted run cannot be read.
    """
    settings: CampaignSettings = build(cfg.campaign)
    path = run.directory / RECORD_FILE
    rows = read_record(path) if path.exists() else []
    done = {(row["configuration"], row["draw"]) for row in rows}
    planned = cases(settings)
    left = [case for case in planned if (case.configuration, case.draw) not in done]
    for number, case in enumerate(left, start=len(planned) - len(left) + 1):
        rows.append(case.attempt(settings))
        _append(path, rows[-1])
        if number % _NEWS_EVERY == 0 or case == left[-1]:
            worst = max(row["ratio"] for row in rows)
            log.info("model %d of %d: largest attack / bound %.4f", number, len(planned), worst)
    _refuse_violations(rows)
    metrics = figures(rows)
    return Outcome(
        metrics=metrics, artifacts={"campaign": path}, objective=metrics["campaign/largest_ratio"]
    )


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a record."""
    restarts: dict[int, float] = {}
    for row in rows:
        restarts[row["configuration"]] = restarts.get(row["configuration"], 0.0) + row["restarts"]
    return {
        "campaign/models": float(len(rows)),
        "campaign/configurations": float(len(restarts)),
        "campaign/pairs": float(sum(row["pairs"] for row in rows)),
        "campaign/restarts": float(min(restarts.values())),
        "campaign/violations": float(sum(map(_is_violation, rows))),
        "campaign/largest_ratio": max(row["ratio"] for row in rows),
        "campaign/largest_block_ratio": max(row["block_ratio"] for row in rows),
        "campaign/seconds": math.fsum(row["seconds"] for row in rows),
    }


def read_record(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a record with numbers as numbers; ``DataError`` for a damaged one."""
    try:
        with path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return [{name: _number(value) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no record of a campaign ({error}); delete it") from error


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _append(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _is_violation(row: dict[str, Any]) -> bool:
    return not max(row["ratio"], row["block_ratio"]) <= 1


def _refuse_violations(rows: Sequence[dict[str, Any]]) -> None:
    if bad := [
        Case(configuration=r["configuration"], draw=r["draw"]) for r in rows if _is_violation(r)
    ]:
        raise CertificateError(
            f"{len(bad)} models with an attack above a bound, first {bad[0]}: a proof is wrong; "
            "please report it"
        )


main = hydra_command("campaign", campaign)
