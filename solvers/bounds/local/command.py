"""What ``lipllm certify around.text=...`` and ``lipllm verify around=DIR`` do."""

import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common.bundle import Bundle, load_bundle
from common.errors import BundleError, CertificateError, DataError
from common.ledger import Outcome, Run
from common.models import LipschitzTransformer
from solvers.bounds.local.checker import verify_local
from solvers.bounds.local.record import LocalCertificate, find_records
from solvers.bounds.local.search import certify_local
from solvers.bounds.local.settings import AroundSettings

log = logging.getLogger(__name__)

_LARGEST_GAIN = 1e6


def certify_around(name: Any, settings: AroundSettings, run: Run) -> Outcome:
    """Prove local certificates of a bundle's model around some prompts.

    Args:
        name: Bundle; its stored certificate is used and not changed.
        settings: Prompts and search.
        run: Where each prompt's record goes (``around-N``).

    Returns:
        The ``local/*`` metrics; one artifact per record. The objective is the median radius.

    Raises:
        LipError: for anything the user can correct.
    """
    bundle = _language_model(name)
    if bundle.certificate is None:
        raise CertificateError(
            f"bundle={name}: local certificates start from the bundle's own, and it has none; "
            f"run first: lipllm certify bundle={name}"
        )
    tokens = [_encode(bundle, text) for text in settings.texts]
    began, records, checked = time.perf_counter(), [], 0.0
    paths: dict[str, Path] = {}
    for index, ids in enumerate(tokens):
        record = certify_local(bundle.model, ids, bundle.certificate, settings=settings.search())
        checked += verify_local(bundle, record).seconds
        paths[f"around-{index}"] = run.directory / f"around-{index}"
        record.save(paths[f"around-{index}"])
        sys.stdout.write(table(bundle, record))
        sys.stdout.flush()
        records.append(record)
    metrics = figures(records)
    metrics["local/seconds"] = time.perf_counter() - began - checked
    metrics["local/verify_seconds"] = checked
    return Outcome(metrics=metrics, artifacts=paths, objective=metrics["local/median_radius"])


def verify_around(name: Any, directory: Any) -> Outcome:
    """Re-prove the local records in a folder; an error names what is wrong.

    Args:
        name: Bundle they are about.
        directory: A record's folder or a run directory with several.
    """
    bundle = _language_model(name)
    records, seconds = [], 0.0
    for path in find_records(str(directory)):
        record = LocalCertificate.load(path)
        try:
            report = verify_local(bundle, record)
        except CertificateError as error:
            raise CertificateError(f"{path}: {error}") from error
        log.info("%s: re-proved %d positions", path, report.positions)
        seconds += report.seconds
        records.append(record)
    return Outcome(metrics=figures(records) | {"local/verify_seconds": seconds})


def figures(records: list[LocalCertificate]) -> dict[str, float]:
    """Return the metrics of some records, over all their positions."""
    local = [radius for record in records for radius in record.radii]
    coarse = [radius for record in records for radius in record.global_radii]
    gains = [min(a / b, _LARGEST_GAIN) for a, b in zip(local, coarse, strict=True) if b > 0]
    return {
        "local/positions": float(len(local)),
        "local/median_radius": statistics.median(local),
        "local/median_global_radius": statistics.median(coarse),
        "local/radius_gain": statistics.median(gains) if gains else 1.0,
        "local/lipschitz": statistics.median(x for r in records for x in r.lipschitz),
        "local/global_lipschitz": statistics.median(x for r in records for x in r.global_lipschitz),
    }


def table(bundle: Bundle, record: LocalCertificate) -> str:
    """Return one line per token: what follows it and the certified radii, local and global."""
    lines = [f"{'token':>12} {'predicted':>12} {'local':>10} {'global':>10} {'factor':>8}"]
    for t, token in enumerate(record.tokens):
        local, coarse = record.radii[t], record.global_radii[t]
        factor = f"{local / coarse:8.2f}" if coarse > 0 else f"{'-':>8}"
        names = [_shown(bundle, token), _shown(bundle, record.top[t])]
        lines.append(f"{names[0]:>12} {names[1]:>12} {local:10.4g} {coarse:10.4g} {factor}")
    medians = [statistics.median(part) for part in (record.radii, record.global_radii)]
    lines.append(f"{'median':>25} {medians[0]:10.4g} {medians[1]:10.4g}")
    return "\n".join(lines) + "\n"


def _shown(bundle: Bundle, token: int) -> str:
    text = repr(bundle.tokenizer.decode([token])) if bundle.tokenizer else str(token)
    return text.encode("ascii", "backslashreplace").decode()


def _encode(bundle: Bundle, text: str) -> list[int]:
    if not text:
        raise DataError("around.text='': expected at least one character")
    if bundle.tokenizer is None:
        raise BundleError(f"{bundle.path}: no tokenizer in it, so no prompt can be read")
    ids = [int(token) for token in bundle.tokenizer.encode(text)]
    context = bundle.model.config.context
    if len(ids) > context:
        raise DataError(
            f"around.text of {len(ids)} tokens: expected at most the model's context of {context}; "
            "shorten it"
        )
    return ids


def _language_model(name: Any) -> Bundle:
    bundle = load_bundle(name)
    if not isinstance(bundle.model, LipschitzTransformer):
        raise BundleError(
            f"bundle={name}: a {bundle.kind}; local certificates are for language models"
        )
    return bundle
