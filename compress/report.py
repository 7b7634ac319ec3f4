"""What a pruning removed, what it can have changed, and how all of it is written down."""

# Legend: M positions.

import dataclasses
import math
from typing import Any

from common.certificate import Certificate
from common.files import plain
from compress.deviation.network import Deviation
from compress.deviation.text import TextBounds, expected_est
from compress.fit import Fit
from compress.flops import token_flops
from compress.pruner import Pruning
from compress.settings import CompressConfig

FORMAT_VERSION = 2
TOTALS = ("tightened", "naive", "reference", "log10_tightened", "log10_naive")
DOMAIN = "every sequence of tokens of l2 norm at most the certificate's radius; real arithmetic"
"""What bounds over all inputs hold for."""
_TEXT = "the held-out text alone; real arithmetic, 1e-12 of the stream allowed for float64"
_ESTIMATE = "estimate: mean square changes on the held-out text, proves nothing"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PruneReport:
    """What was removed and by how much the output can have moved.

    Deviations are RMS over the vocabulary, largest over tokens, in units of logits.

    Attributes:
        settings: What was asked for.
        pruning: The model and the decisions.
        deviation: Bounds over all inputs.
        text: Bounds and measurements on held-out text.
        before: Certificate of the dense model.
        after: Certificate of the pruned model, proved anew.
        size: Parameters and operations per token, of the pruned places and of the whole model,
            each before and after.
    """

    settings: CompressConfig
    pruning: Pruning
    deviation: Deviation
    text: TextBounds
    before: Certificate
    after: Certificate
    size: dict[str, dict[str, dict[str, float]]]

    @property
    def removed_fraction(self) -> float:
        """Removed share of the parameters of the pruned places."""
        return self.pruning.removed_fraction

    @property
    def params_fraction(self) -> float:
        """Parameters of the pruned model over those of the dense one."""
        params = self.size["params"]["model"]
        return params["after"] / params["before"]

    @property
    def measured_deviation(self) -> float:
        """Largest deviation seen on held-out text."""
        return self.text.measured.logits

    @property
    def semi_empirical_deviation(self) -> float:
        """Largest bound for that text: measured changes of the blocks, proved propagation."""
        return float(self.text.bound_M.max())

    @property
    def certified_deviation(self) -> float:
        """Bound over every input of the certificate's domain."""
        return self.deviation.logits

    @property
    def top1_agreement(self) -> float:
        """Share of held-out positions whose most likely token is unchanged."""
        return self.text.measured.top1_agreement

    @property
    def certified_top1(self) -> float:
        """Share of them for which the bound over all inputs proves that."""
        return self.text.proved_domain

    @property
    def text_top1(self) -> float:
        """Share of them for which the bound for that text proves that."""
        return self.text.proved_text

    @property
    def expected_est(self) -> float:
        """Estimate of the root mean square deviation, see ``deviation.text``."""
        return expected_est(self.text.measured, self.deviation.b)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``compression.json``."""
        names = (
            "removed_fraction",
            "params_fraction",
            "measured_deviation",
            "semi_empirical_deviation",
            "certified_deviation",
            "top1_agreement",
            "certified_top1",
        )
        content = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "tau": self.pruning.tau,
            **{name: getattr(self, name) for name in names},
            "size": self.size,
            "certificate": {
                name: {total: getattr(proof, total) for total in TOTALS}
                for name, proof in (("before", self.before), ("after", self.after))
            },
            "deviation": self._deviations(),
            "layers": [self._layer(fit) for fit in self.pruning.fits],
        }
        return plain(content)

    def _deviations(self) -> dict[str, Any]:
        worst = {
            "form_a": self.deviation.a.bound,
            "form_b": self.deviation.b.bound,
            "bound": self.deviation.logits,
            "limit_from_radii": self.deviation.b.limit,
            "top1": self.certified_top1,
            "radius": self.before.radius,
            "holds_for": DOMAIN,
        }
        text = {
            **self.text.quantiles(),
            "positions": len(self.text.bound_M),
            "top1": self.text_top1,
            "top1_measured": self.top1_agreement,
            "holds_for": _TEXT,
        }
        expected = {"value": self.expected_est, "holds_for": _ESTIMATE}
        return {"worst_case": worst, "text": text, "expected_est": expected}

    def _layer(self, fit: Fit) -> dict[str, Any]:
        target, measured = fit.target, self.text.measured
        block = 2 * target.layer + (target.kind == "mlp")
        return fit.to_dict() | {
            "certified_delta": self.deviation.b.deltas[block],
            "certified_delta_dense": self.deviation.a.deltas[block],
            "measured_delta": measured.deltas[block],
            "rms_delta": math.sqrt(float(measured.mean_squares_L[block])),
            "radius": self.deviation.b.radii[block],
        }


def sizes(dense: Any, pruning: Pruning) -> dict[str, dict[str, dict[str, float]]]:
    """Return parameters and operations per token before and after.

    Args:
        dense: Transformer before pruning.
        pruning: The result; ``pruned_places`` are the places it names.
    """
    places: dict[str, dict[str, float]] = {
        name: {
            "before": sum(getattr(f.target, name) * f.target.components for f in pruning.fits),
            "after": sum(
                getattr(f.target, name) * (len(f.kept_K) // f.target.unit) for f in pruning.fits
            ),
        }
        for name in ("params", "flops")
    }
    pruned = pruning.model
    whole = {
        "params": {"before": dense.num_parameters, "after": pruned.num_parameters},
        "flops": {"before": token_flops(dense.config), "after": token_flops(pruned.config)},
    }
    return {
        "params": {"pruned_places": places["params"], "model": whole["params"]},
        "flops_per_token": {"pruned_places": places["flops"], "model": whole["flops"]},
    }
