"""``prune``: from a certified bundle to a smaller bundle and the account of what it cost."""

# Legend: B sequences, T tokens, M positions.

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.bundle import Bundle, save_bundle
from common.certificate import Certificate
from common.errors import BundleError, CertificateError, ConfigError, DataError
from common.norms import round_up
from compress.adapters import LipschitzAdapter
from compress.adapters.lipschitz import amplifications
from compress.deviation import Deviation, certified_deviation
from compress.fit import Fit
from compress.measure import Measured, measure_deviation
from compress.pruner import Pruning, Survey, prune_model
from compress.settings import CompressConfig

FORMAT_VERSION = 1
AGREEMENT = 1e-9
"""Relative rounding allowed between a measurement and the bound above it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PruneReport:
    """What was removed and by how much the output can have moved.

    Deviations are RMS over the vocabulary, largest over tokens, in units of logits.

    Attributes:
        settings: What was asked for.
        removed_fraction: Removed share of the MLP parameters.
        params_fraction: Parameters of the pruned model over those of the dense one.
        measured_deviation: Largest one seen on held-out text.
        semi_empirical_deviation: Largest per-block changes seen there, certified propagation.
        certified_deviation: Bound over every input of the certificate's domain.
        top1_agreement: Share of held-out positions whose most likely token is unchanged.
        certified_top1: Share of them whose margin proves that.
        layers: Per layer: width before and after, kept neurons, relative errors, changes.
        pruning: The model and the per-layer decisions.
        deviation: The bound's parts.
    """

    settings: CompressConfig
    removed_fraction: float
    params_fraction: float
    measured_deviation: float
    semi_empirical_deviation: float
    certified_deviation: float
    top1_agreement: float
    certified_top1: float
    layers: tuple[dict[str, Any], ...]
    pruning: Pruning
    deviation: Deviation

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``compression.json``."""
        settings = asdict(self.settings)
        if settings["tau"] == float("inf"):
            settings["tau"] = "inf"
        return {
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "removed_fraction": self.removed_fraction,
            "params_fraction": self.params_fraction,
            "measured_deviation": self.measured_deviation,
            "semi_empirical_deviation": self.semi_empirical_deviation,
            "certified_deviation": self.certified_deviation,
            "top1_agreement": self.top1_agreement,
            "certified_top1": self.certified_top1,
            "layers": list(self.layers),
        }


def prune(
    bundle: Bundle,
    settings: CompressConfig,
    tokens_BT: Tensor,
    *,
    held_BT: Tensor | None = None,
    path: str | Path | None = None,
    found: Survey | None = None,
    command: str = "",
) -> tuple[Bundle, PruneReport]:
    """Prune a certified bundle and write the smaller one. Nothing is inherited: certify it again.

    Args:
        bundle: Dense transformer with its certificate.
        settings: What to do.
        tokens_BT: Calibration tokens (sequences, length), at most the model's context long.
        held_BT: Other text, for the measured deviations; the calibration text by default.
        path: New bundle; by default beside the old one, with ``-pruned`` appended.
        found: A survey of the same model and tokens, if there is one.
        command: The command line, for the manifest.

    Returns:
        The new bundle and the report.

    Raises:
        BundleError: for a classifier, or when the bundle cannot be written.
        CertificateError: when the bundle has no certificate, or a void one.
        ConfigError: when ``bias`` is asked of a model without biases.
        DataError: for too little or non-finite calibration data.
    """
    certificate = require_certificate(bundle)
    check_model(bundle.config, settings)
    held_BT = tokens_BT if held_BT is None else held_BT
    gains = amplifications(LipschitzAdapter(bundle.model), certificate)
    pruning = prune_model(bundle.model, tokens_BT, settings, gains=gains, found=found)
    report = make_report(bundle.model, certificate, pruning, held_BT, settings)
    where = Path(path) if path is not None else bundle.path.with_name(f"{bundle.path.name}-pruned")
    saved = save_bundle(
        where,
        pruning.model,
        bundle.tokenizer,
        compression=report.to_dict(),
        parent=bundle,
        command=command,
    )
    return saved, report


def make_report(
    dense: Any,
    certificate: Certificate,
    pruning: Pruning,
    held_BT: Tensor,
    settings: CompressConfig,
    *,
    max_evals: int = 20,
) -> PruneReport:
    """Measure and bound what a pruning changed.

    Args:
        dense: Transformer before pruning.
        certificate: Its proof.
        pruning: The result.
        held_BT: Text for the measurements.
        settings: What was asked for.
        max_evals: Effort on the certified bound, see ``certified_deviation``.

    Raises:
        CertificateError: if a measurement exceeds its bound, which would refute the proof.
    """
    deviation = certified_deviation(
        dense, pruning.model, pruning.kept, certificate, max_evals=max_evals
    )
    measured = measure_deviation(dense, pruning.model, held_BT)
    semi = deviation.certificate.logit_deviation(measured.deltas)
    _check_order(measured.logits, semi, deviation.logits)
    return PruneReport(
        settings=settings,
        removed_fraction=pruning.removed_fraction,
        params_fraction=pruning.model.num_parameters / dense.num_parameters,
        measured_deviation=measured.logits,
        semi_empirical_deviation=semi,
        certified_deviation=deviation.logits,
        top1_agreement=measured.top1_agreement,
        certified_top1=_proved_share(measured, deviation),
        layers=tuple(_layer_record(fit, deviation, measured) for fit in pruning.fits),
        pruning=pruning,
        deviation=deviation,
    )


def require_certificate(bundle: Bundle) -> Certificate:
    """Return the certificate of a transformer bundle.

    Raises:
        BundleError: for another kind of model.
        CertificateError: when there is none, naming the command that makes one.
    """
    if bundle.kind != "transformer":
        raise BundleError(f"{bundle.path}: a {bundle.kind}; compress expects a transformer")
    if bundle.certificate is None:
        raise CertificateError(
            f"{bundle.path}: no certificate, so no deviation can be certified; "
            f"run: lipllm certify bundle={bundle.path}"
        )
    return bundle.certificate


def check_model(config: Any, settings: CompressConfig) -> None:
    """Check what depends on settings and model together, before any work is done.

    Raises:
        ConfigError: when ``bias`` is asked of a model without biases.
        DataError: when calibration sequences would be longer than the context.
    """
    if settings.bias and not all(config.mlp_bias):
        raise ConfigError(
            "compress.bias=true: the model's MLPs have no bias to absorb the mean; "
            "set compress.bias=false or train with model.mlp_bias=true"
        )
    if settings.length is not None and settings.length > config.context:
        raise DataError(
            f"compress.length={settings.length}: expected at most the model's context of "
            f"{config.context}; lower it"
        )


def _check_order(measured: float, semi: float, certified: float) -> None:
    for low, high, names in (
        (measured, semi, "measured deviation above the semi-empirical one"),
        (semi, certified, "semi-empirical deviation above the certified one"),
    ):
        if low > high * (1 + AGREEMENT):
            raise CertificateError(
                f"{names} ({low:.6g} > {high:.6g}): the certificate is refuted; certify the dense "
                "bundle again and report this"
            )


def _proved_share(measured: Measured, deviation: Deviation) -> float:
    """Return the share of positions whose margin exceeds what a pair of logits can move."""
    proof = deviation.certificate
    if proof.head_norm == 0:
        return float((measured.margins_M > 0).double().mean())
    stream = deviation.logits * math.sqrt(proof.vocab_size) / proof.head_norm
    moved = round_up(round_up(stream) * proof.pair_norm)
    return float((measured.margins_M > moved).double().mean())


def _layer_record(fit: Fit, deviation: Deviation, measured: Measured) -> dict[str, Any]:
    block = 2 * fit.target.layer + (fit.target.kind == "mlp")
    return {
        "layer": fit.target.layer,
        "kind": fit.target.kind,
        "unit": fit.target.unit,
        "dense_width": fit.target.inputs,
        "width": len(fit.kept_K),
        "kept": fit.kept_K.tolist(),
        "error": fit.error,
        "held_error": fit.held_error,
        "certified_delta": deviation.deltas[block],
        "measured_delta": measured.deltas[block],
        "radius": deviation.radii[block],
    }
