"""``prune``: from a certified bundle to a smaller, certified bundle and the account of its cost."""

# Legend: N sequences or images, B sequences, T tokens.

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.bundle import Bundle, save_bundle
from common.bundle_format import WEIGHTS
from common.certificate import Certificate
from common.errors import CertificateError
from common.images import Images
from compress.adapters import adapter_for
from compress.classifier_report import ClassifierReport, classifier_report
from compress.deviation.network import Deviation, certified_deviation
from compress.deviation.recertify import EVALS, recertify
from compress.deviation.text import (
    AGREEMENT,
    ALLOWANCE,
    Measured,
    measure_deviation,
    text_bounds,
)
from compress.hold import certified_limit
from compress.pruner import Pruning, Survey, chosen_targets, prune_model
from compress.report import PruneReport as PruneReport
from compress.report import sizes
from compress.settings import CompressConfig
from compress.statistics.calibration import require_room


def prune(
    bundle: Bundle,
    settings: CompressConfig,
    inputs: Tensor,
    *,
    held: Tensor | Images | None = None,
    path: str | Path | None = None,
    found: Survey | None = None,
    command: str = "",
    max_evals: int = 20,
    tighten: bool = True,
) -> tuple[Bundle, PruneReport | ClassifierReport]:
    """Prune a certified bundle and write the smaller one with a certificate of its own.

    Args:
        bundle: Dense transformer or classifier with its certificate.
        settings: What to do.
        inputs: Calibration tokens (N, T), at most the model's context long, or images (N, I).
        held: What is measured: other tokens, the calibration text by default; for a classifier
            the images with their classes, of which the validation part counts.
        path: New bundle; by default beside the old one, with ``-pruned`` appended.
        found: A survey of the same model and inputs, if there is one.
        command: The command line, for the manifest.
        max_evals: Effort on the bounds, see ``make_report``.
        tighten: As in ``make_report``.

    Returns:
        The new bundle and the report.

    Raises:
        BundleError: when the bundle cannot be written.
        CertificateError: when the bundle has no certificate, or a void one.
        ConfigError: when ``bias`` is asked of a model without biases.
        DataError: for too little or non-finite calibration data.
    """
    effort = {"max_evals": max_evals, "tighten": tighten}
    pruner = PRUNERS[bundle.kind]
    report = pruner(bundle, settings, inputs, inputs if held is None else held, found, effort)
    where = Path(path) if path is not None else bundle.path.with_name(f"{bundle.path.name}-pruned")
    saved = save_bundle(
        where,
        report.pruning.model,
        bundle.tokenizer,
        certificate=report.after,
        compression=report.to_dict(),
        parent=bundle,
        command=command,
    )
    return saved, report


def _prune_transformer(
    bundle: Bundle,
    settings: CompressConfig,
    tokens_BT: Tensor,
    held_BT: Tensor,
    found: Survey | None,
    effort: Mapping[str, Any],
) -> PruneReport:
    certificate = require_certificate(bundle)
    gains = adapter_for(bundle.model).amplifications(certificate)
    limit = certified_limit(bundle.model, certificate, settings.hold)
    pruning = prune_model(bundle.model, tokens_BT, settings, gains=gains, found=found, limit=limit)
    return make_report(bundle.model, certificate, pruning, held_BT, settings, **effort)


def _prune_classifier(
    bundle: Bundle,
    settings: CompressConfig,
    images_NI: Tensor,
    held: Images,
    found: Survey | None,
    effort: Mapping[str, Any],
) -> ClassifierReport:
    certificate = require_certificate(bundle)
    adapter = adapter_for(bundle.model)
    gains = adapter.amplifications(certificate)
    pruning = prune_model(bundle.model, images_NI, settings, gains=gains, found=found)
    return classifier_report(bundle.model, pruning, held, certificate, settings, **effort)


PRUNERS: dict[str, Callable[..., Any]] = {
    "transformer": _prune_transformer,
    "classifier": _prune_classifier,
}
"""Per kind of bundle: from bundle, settings, inputs, held-out inputs, survey, effort to a report
with ``pruning``, ``after`` (the new certificate) and ``to_dict``."""


def make_report(
    dense: Any,
    certificate: Certificate,
    pruning: Pruning,
    held_BT: Tensor,
    settings: CompressConfig,
    *,
    max_evals: int = 20,
    tighten: bool = True,
) -> PruneReport:
    """Certify the pruned model, and measure and bound what the pruning changed.

    Args:
        dense: Transformer before pruning.
        certificate: Its proof.
        pruning: The result.
        held_BT: Text for the measurements.
        settings: What was asked for.
        max_evals: Eigen-decompositions per search of multipliers; 0 searches nothing. A proof that
            the pruning brings along is taken as it is.
        tighten: False certifies the pruned model from norms alone, for many models in a row.

    Raises:
        CertificateError: if a measurement exceeds its bound, which would refute the proof.
    """
    model, kept = pruning.model, pruning.kept
    evals = max(max_evals, EVALS) if max_evals else 0
    after = recertify(
        dense, model, kept, certificate, max_evals=evals, tighten=tighten, known=pruning.proof
    )
    deviation = certified_deviation(
        dense, model, kept, certificate, changed_certificate=after, max_evals=max_evals
    )
    text = text_bounds(measure_deviation(dense, model, held_BT), deviation)
    _check_changes(text.measured, deviation)
    return PruneReport(
        settings=settings,
        pruning=pruning,
        deviation=deviation,
        text=text,
        before=certificate,
        after=after,
        size=sizes(dense, pruning),
    )


def weight_bytes(pruned: Bundle, dense: Bundle) -> float:
    """Return the size of the weight file after pruning over that before."""
    after, before = ((bundle.path / WEIGHTS).stat().st_size for bundle in (pruned, dense))
    return after / before


def require_certificate(bundle: Bundle) -> Any:
    """Return the certificate of a bundle.

    Raises:
        CertificateError: when there is none, naming the command that makes one.
    """
    if bundle.certificate is None:
        raise CertificateError(
            f"{bundle.path}: no certificate, so no deviation can be certified; "
            f"run: lipllm certify bundle={bundle.path}"
        )
    return bundle.certificate


def check_model(model: Any, settings: CompressConfig) -> None:
    """Check what depends on settings and language model together, before any work is done.

    Raises:
        ConfigError: when ``bias`` is asked of a model without biases, or calibration sequences
            would be longer than the context.
    """
    chosen_targets(adapter_for(model), settings)
    if settings.length is not None:
        require_room(model, settings.length)


def _check_changes(measured: Measured, deviation: Deviation) -> None:
    """Refuse a text whose blocks move by more than is proved; their rounding does not count."""
    runs = (measured.running_a_ML, measured.running_b_ML)
    for form, running_ML in zip(deviation.forms, runs, strict=True):
        found = running_ML.amax(0).tolist()
        for block, change, delta in zip(form.certificate.blocks, found, form.deltas, strict=True):
            room = ALLOWANCE * (block.radius_in + block.radius_out)
            if change > delta * (1 + AGREEMENT) + room:
                raise CertificateError(
                    f"measured change of block {block.index} above the certified one "
                    f"({change:.6g} > {delta:.6g}): the certificate is refuted; certify the dense "
                    "bundle again and report this"
                )
