"""Sparsity against quality, proof and speed: further budgets for the report."""

# Legend: B sequences, T tokens.

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.certificate import Certificate
from common.errors import ConfigError
from common.files import write_json
from compress.adapters import adapter_for
from compress.hold import certified_limit
from compress.measure import Quality, Reference
from compress.pruner import Pruning, Survey, prune_model
from compress.record import make_report
from compress.report import PruneReport
from compress.settings import CompressConfig
from compress.timing import decode_speed, forward_speed

log = logging.getLogger(__name__)


def frontier_points(
    dense: Any,
    certificate: Certificate,
    found: Survey,
    texts: tuple[Tensor, Tensor],
    reference: Reference,
    report: PruneReport,
) -> list[dict[str, Any]]:
    """Prune the dense model at every ``settings.frontier`` budget and describe the results.

    Args:
        dense: Transformer before pruning.
        certificate: Its proof.
        found: Survey of it that reaches all budgets.
        texts: Calibration tokens (B, T) and validation windows (B, T + 1).
        reference: The dense model on the windows.
        report: Of the main run; its settings apply but for ``keep`` and ``order``.

    Returns:
        One record per budget within reach; the main run's own budget is left out.
    """
    tokens_BT, windows_BT = texts
    points = []
    gains = adapter_for(dense).amplifications(certificate)
    limit = certified_limit(dense, certificate, report.settings.hold)
    how = {"gains": gains, "found": found, "limit": limit}
    for settings, pruning in prunings(dense, tokens_BT, report.settings, order="one_shot", **how):
        other = make_report(dense, certificate, pruning, windows_BT[:, :-1], settings)
        quality = reference.quality(pruning.model)
        points.append(frontier_point(other, quality, speeds(dense, pruning.model, settings.rounds)))
    return points


def prunings(
    dense: Any, inputs: Tensor, settings: CompressConfig, *, order: str, **how: Any
) -> Iterator[tuple[CompressConfig, Pruning]]:
    """Prune at every other budget of the frontier, the largest first.

    Args:
        dense: Model before pruning.
        inputs: Calibration inputs.
        settings: Of the main run; they apply but for ``keep`` and ``order``.
        order: Of the further ones.
        how: ``gains``, ``found`` and ``limit`` of ``prune_model``.

    Yields:
        Settings and result; a budget out of reach is left out, and the log says so.
    """
    for keep in sorted(set(settings.frontier) - {settings.keep}, reverse=True):
        other = dataclasses.replace(settings, keep=keep, order=order)
        log.info("frontier: keep %g", keep)
        try:
            pruning = prune_model(dense, inputs, other, **how)
        except ConfigError as error:
            log.warning("compress.frontier: %g left out: %s", keep, error)
            continue
        yield other, pruning
        del pruning  # a caller that drops it too has the memory of one pruned model at a time


def metrics_point(settings: CompressConfig, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the record of one pruned model of which only its metrics are known.

    Args:
        settings: Of its pruning.
        metrics: ``compress/*``, with the parameters before and after.
    """
    found = {name.removeprefix("compress/"): value for name, value in metrics.items()}
    names = {"tightened": "cert_tightened", "naive": "cert_naive"}
    return {
        "keep": settings.keep,
        "keep_heads": settings.keep_heads,
        "order": settings.order,
        "params_fraction": found["params"] / found["params_before"],
        **{names.get(name, name): value for name, value in found.items()},
    }


def write_frontier(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Write the records, the largest budget first."""
    write_json(path, sorted(points, key=lambda point: -point["keep"]))


def frontier_point(
    report: PruneReport, quality: Quality, times: dict[str, float]
) -> dict[str, Any]:
    """Return the record of one pruned model.

    Args:
        report: Of the pruning.
        quality: Of the pruned model on the validation text.
        times: Of ``speeds``.
    """
    flops = report.size["flops_per_token"]["model"]
    return {
        "keep": report.settings.keep,
        "keep_heads": report.settings.keep_heads,
        "order": report.settings.order,
        "removed_fraction": report.removed_fraction,
        "neurons_removed": report.pruning.removed("mlp"),
        "heads_removed": report.pruning.removed("heads"),
        "params_fraction": report.params_fraction,
        "flops_fraction": flops["after"] / flops["before"],
        "val_bits_per_byte": quality.bits_per_byte,
        "kl_nats": quality.kl_nats,
        "certified_deviation": report.certified_deviation,
        "semi_empirical_deviation": report.semi_empirical_deviation,
        "measured_deviation": report.measured_deviation,
        "cert_tightened": report.after.tightened,
        "cert_tightened_before": report.before.tightened,
        "cert_naive": report.after.naive,
        **times,
    }


def speeds(dense: Any, pruned: Any, rounds: int) -> dict[str, float]:
    """Return how many times faster a forward pass and a decode step have become (measured).

    Args:
        dense: Transformer before pruning.
        pruned: After pruning.
        rounds: Pairs of measurements.
    """
    return {
        "forward_speedup": forward_speed(dense, pruned, rounds=rounds).ratio,
        "decode_speedup": decode_speed(dense, pruned, rounds=rounds).ratio,
    }
