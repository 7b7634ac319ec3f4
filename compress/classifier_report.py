"""What pruning a classifier removed and changed: bounds over all images, measurements on some."""

# Legend: N images.

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from common.classifier_certificate import ClassifierCertificate
from common.errors import CertificateError
from common.files import plain
from common.images import Images
from compress.classifier_measure import Seen, look
from compress.deviation.classifier import ClassifierDeviation, classifier_deviation
from compress.deviation.text import AGREEMENT
from compress.fit import Fit
from compress.pruner import Pruning
from compress.report import FORMAT_VERSION, TOTALS
from compress.settings import CompressConfig
from solvers.bounds.classifier import certify_classifier

DOMAIN = "every image of pixels in [0, 1]; real arithmetic"
"""What bounds over all images hold for."""
_IMAGES = "the held-out images alone; real arithmetic, float64 allowed for"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassifierReport:
    """The account of one pruning. Deviations are RMS over the classes, largest over images.

    Attributes:
        settings: What was asked for.
        pruning: The model and the decisions.
        deviation: Bounds over all images.
        seen: Measurements on held-out images.
        before: Certificate of the dense model.
        after: Certificate of the pruned model, proved anew.
        params: Parameters before and after.
        flops: Operations per image before and after (2 per multiply-add of the matrices).
    """

    settings: CompressConfig
    pruning: Pruning
    deviation: ClassifierDeviation
    seen: Seen
    before: ClassifierCertificate
    after: ClassifierCertificate
    params: tuple[int, int]
    flops: tuple[float, float]

    @property
    def removed_fraction(self) -> float:
        """Removed share of the parameters of the pruned places."""
        return self.pruning.removed_fraction

    @property
    def params_fraction(self) -> float:
        """Parameters of the pruned model over those of the dense one."""
        return self.params[1] / self.params[0]

    @property
    def measured_deviation(self) -> float:
        """Largest deviation seen on held-out images (estimate from below)."""
        return float(self.seen.logits_N.max())

    @property
    def semi_empirical_deviation(self) -> float:
        """Largest bound for the held-out images alone."""
        return float(self.seen.bound_N.max())

    @property
    def certified_deviation(self) -> float:
        """Bound over all images."""
        return self.deviation.bound

    @property
    def certified_top1(self) -> float:
        """Share of held-out images whose class that bound proves unchanged."""
        return self._proved(torch.full_like(self.seen.bound_N, self.deviation.bound))

    @property
    def images_top1(self) -> float:
        """Share of them for which the bound for the image itself does."""
        return self._proved(self.seen.bound_N)

    def metrics(self) -> dict[str, float]:
        """Return the ``compress/*`` metrics."""
        values = {
            "removed_fraction": self.removed_fraction,
            "mlp_neurons_removed": self.pruning.removed("mlp"),
            "params": self.params[1],
            "params_before": self.params[0],
            "flops_fraction": self.flops[1] / self.flops[0],
            "fidelity": self.pruning.fidelity,
            "val_accuracy": self.seen.accuracy,
            "val_accuracy_before": self.seen.accuracy_before,
            "top1_agreement": self.seen.top1_agreement,
            "certified_top1": self.certified_top1,
            "measured_deviation": self.measured_deviation,
            "semi_empirical_deviation": self.semi_empirical_deviation,
            "certified_deviation": self.certified_deviation,
            "naive": self.after.naive,
            "tightened": self.after.tightened,
        }
        return {f"compress/{name}": float(value) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``compression.json``."""
        names = ("removed_fraction", "params_fraction", "measured_deviation")
        names += ("semi_empirical_deviation", "certified_deviation", "certified_top1")
        pairs = {"params": self.params, "flops_per_image": self.flops}
        proofs = {"before": self.before, "after": self.after}
        content = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "tau": self.pruning.tau,
            **{name: getattr(self, name) for name in names},
            "top1_agreement": self.seen.top1_agreement,
            "accuracy": {"before": self.seen.accuracy_before, "after": self.seen.accuracy},
            "size": {
                name: {"model": {"before": pair[0], "after": pair[1]}}
                for name, pair in pairs.items()
            },
            "certificate": {
                name: {total: getattr(proof, total) for total in TOTALS}
                for name, proof in proofs.items()
            },
            "deviation": {
                "worst_case": {
                    "form_a": self.deviation.form_a.bound,
                    "form_b": self.deviation.form_b.bound,
                    "bound": self.deviation.bound,
                    "top1": self.certified_top1,
                    "holds_for": DOMAIN,
                },
                "images": {
                    "count": len(self.seen.bound_N),
                    "bound": self.semi_empirical_deviation,
                    "top1": self.images_top1,
                    "holds_for": _IMAGES,
                },
            },
            "layers": [self._layer(fit) for fit in self.pruning.fits],
        }
        return plain(content)

    def _proved(self, bound_N: Tensor) -> float:
        """A difference of two logits moves by at most the root of 2 times their l2 change."""
        moved_N = bound_N * math.sqrt(2 * self.before.classes) * (1 + AGREEMENT)
        return float((self.seen.margins_N > moved_N).double().mean())

    def _layer(self, fit: Fit) -> dict[str, Any]:
        index = fit.target.layer
        return fit.to_dict() | {
            "certified_delta": self.deviation.form_b.deltas[index],
            "certified_delta_dense": self.deviation.form_a.deltas[index],
            "measured_delta": float(self.seen.deltas_LN[index].max()),
            "radius": self.deviation.form_b.radii[index],
        }


def classifier_report(
    dense: Any,
    pruning: Pruning,
    images: Images,
    certificate: ClassifierCertificate,
    settings: CompressConfig,
    *,
    max_evals: int = 20,
    tighten: bool = True,
) -> ClassifierReport:
    """Certify the pruned classifier, and measure and bound what the pruning changed.

    Args:
        dense: ``LipschitzMLP`` before pruning.
        pruning: The result.
        images: Their validation part is measured.
        certificate: Proof of the dense model.
        settings: What was asked for.
        max_evals: Effort on each bound; 0 searches nothing.
        tighten: False certifies the pruned model from norms alone.

    Raises:
        CertificateError: if a measurement exceeds its bound, which would refute a proof.
    """
    deviation = classifier_deviation(dense, pruning, norms=certificate.norms, max_evals=max_evals)
    seen = look(deviation, dense.activation, images)
    _check_order(seen, deviation.bound)
    pruned = pruning.model
    return ClassifierReport(
        settings=settings,
        pruning=pruning,
        deviation=deviation,
        seen=seen,
        before=certificate,
        after=certify_classifier(pruned, tighten),
        params=(dense.num_parameters, pruned.num_parameters),
        flops=(_flops(dense), _flops(pruned)),
    )


def _flops(model: Any) -> float:
    return 2.0 * sum(linear.weight.numel() for linear in model.linears)


def _check_order(seen: Seen, certified: float) -> None:
    bound = seen.bound_N.new_tensor(certified)
    for low, high, names in (
        (seen.logits_N, seen.bound_N, "measured deviation above the bound for its image"),
        (seen.bound_N.max(), bound, "bound for an image above that for all"),
    ):
        if bool((low > high * (1 + AGREEMENT) + AGREEMENT * seen.size).any()):
            raise CertificateError(
                f"{names} ({float(low.max()):.6g} against {float(high.max()):.6g}): the "
                "certificate is refuted; certify the dense bundle again and report this"
            )
