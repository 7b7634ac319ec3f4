"""Sparsity against quality and proof: further budgets, evaluated one-shot for the report."""

# Legend: B sequences, T tokens.

import dataclasses
from typing import Any

from torch import Tensor

from common.certificate import Certificate
from compress.adapters import adapter_for
from compress.measure import bits_per_byte
from compress.pruner import Survey, prune_model
from compress.record import PruneReport, make_report
from solvers.bounds import certify


def frontier_points(
    dense: Any,
    certificate: Certificate,
    found: Survey,
    texts: tuple[Tensor, Tensor],
    bytes_per_token: float,
    report: PruneReport,
) -> list[dict[str, Any]]:
    """Prune the dense model at every ``settings.frontier`` budget and describe the results.

    Args:
        dense: Transformer before pruning.
        certificate: Its proof.
        found: Survey of it that reaches all budgets.
        texts: Calibration tokens (B, T) and validation windows (B, T + 1).
        bytes_per_token: Of the corpus.
        report: Of the main run; its settings apply but for ``keep`` and ``order``.

    Returns:
        One record per budget; the main run's own budget is left out.
    """
    tokens_BT, windows_BT = texts
    points = []
    gains = adapter_for(dense).amplifications(certificate)
    for keep in sorted(set(report.settings.frontier) - {report.settings.keep}, reverse=True):
        settings = dataclasses.replace(report.settings, keep=keep, order="one_shot")
        pruning = prune_model(dense, tokens_BT, settings, gains=gains, found=found)
        # A few multiplier steps matter for the product's own bundle, not for a curve.
        other = make_report(dense, certificate, pruning, windows_BT[:, :-1], settings, max_evals=0)
        bits = bits_per_byte(pruning.model, windows_BT, bytes_per_token)
        points.append(frontier_point(other, bits))
    return points


def frontier_point(report: PruneReport, bits: float) -> dict[str, Any]:
    """Return the record of one pruned model.

    Args:
        report: Of the pruning.
        bits: Its validation loss in bits per byte.
    """
    return {
        "keep": report.settings.keep,
        "order": report.settings.order,
        "removed_fraction": report.removed_fraction,
        "val_bits_per_byte": bits,
        "certified_deviation": report.certified_deviation,
        "semi_empirical_deviation": report.semi_empirical_deviation,
        "measured_deviation": report.measured_deviation,
        "cert_naive": certify(report.pruning.model, tighten=False).naive,
    }
