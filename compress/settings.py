"""What can be chosen about pruning, validated where it enters."""

import math
from dataclasses import dataclass, field

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError
from compress.budgets.allocate import ALLOCATORS
from compress.budgets.budget import Budget
from compress.compensate import METHODS
from compress.scoring.fidelity import SCORES
from compress.targets import Target

ORDERS = ("sequential", "one_shot")
HOLDS = ("tightened", "naive")
CALIBRATIONS = ("data", "model", "random")
AUTO = "auto"
ENOUGH_TOKENS = 10
"""Tokens per input from which the small default ridge is safe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Settings of one pruning run.

    Attributes:
        keep: Fraction of the budget that stays, in (0, 1].
        keep_heads: The same for attention heads, which go in groups that share keys and values; 1
            leaves them alone, None puts heads and all else under the one budget ``keep``.
        budget: What ``keep`` is a fraction of: parameters, operations or measured seconds.
        score: Which components go first; name in ``scoring.fidelity.SCORES``.
        comp: How the kept weights make up for the removed ones: name in ``compensate.METHODS``,
            or ``auto``: ``lsq_capped`` where there is a certificate to keep, else ``lsq``.
        tau: Cap of ``lsq_capped``: allowed growth of the product of a block's two spectral
            norms; ``inf`` lifts the cap. At 1 the certificate of the whole network decides: caps
            rise or fall until it does not grow (biases can make it; a warning then says so).
        hold: Which number of the certificate must not grow at ``tau=1``: ``tightened``, the proved
            constant (without one the bound from norms), or always ``naive``, the bound from norms.
            Classifiers are held by norms.
        bias: Let the biases of the pruned maps, where there are any, absorb the mean of what is
            removed.
        allocation: How layers share the budget; name in ``budgets.allocate.ALLOCATORS``.
        order: ``sequential`` refits each layer on the already pruned prefix, ``one_shot`` uses
            the dense model's activations.
        ridge: Ridge toward the original weights, relative to the mean activation energy; by
            default 1e-6 with at least ten tokens per input, else 1e-4.
        min_keep: No layer keeps less than this fraction of its components.
        align: Kept components per layer are a multiple of this; heads are not aligned.
        calibration: Where the calibration inputs come from: ``data`` (the training split),
            ``model`` (sampled from the model itself) or ``random`` (tokens, or Gaussian images).
        tokens: Calibration tokens; for images as many numbers are pixels.
        length: Tokens per calibration sequence; the model's context by default.
        holdout: Fraction of the calibration sequences that measures the error only.
        eval_tokens: Validation tokens for bits per byte and measured deviations.
        rounds: Paired timings behind each measured speed.
        frontier: Further values of ``keep`` for the report: bundles are evaluated one-shot on one
            survey; a checkpoint, whose survey may not fit into memory, in ``order``.
        seed: Draws the calibration sequences and the ``random`` score.
    """

    keep: float = 0.75
    keep_heads: float | None = 1.0
    budget: Budget = field(default_factory=Budget)
    score: str = "obs"
    comp: str = AUTO
    tau: float = 1.0
    hold: str = "tightened"
    bias: bool = False
    allocation: str = "uniform"
    order: str = "sequential"
    ridge: float | None = None
    min_keep: float = 0.1
    align: int = 1
    calibration: str = "data"
    tokens: int = 65536
    length: int | None = None
    holdout: float = 0.1
    eval_tokens: int = 16384
    rounds: int = 15
    frontier: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        check_types(self)
        budgets = [("keep", self.keep), *(("frontier", value) for value in self.frontier)]
        if self.keep_heads is not None:
            budgets.append(("keep_heads", self.keep_heads))
        for name, value in budgets:
            within(f"compress.{name}", value, 0.0, 1.0)
            positive(f"compress.{name}", value)
        one_of("compress.score", self.score, SCORES)
        one_of("compress.comp", self.comp, (AUTO, *METHODS))
        one_of("compress.allocation", self.allocation, ALLOCATORS)
        one_of("compress.hold", self.hold, HOLDS)
        one_of("compress.order", self.order, ORDERS)
        one_of("compress.calibration", self.calibration, CALIBRATIONS)
        if not self.tau > 0 or math.isnan(self.tau):
            raise ConfigError(f"compress.tau={self.tau}: expected a number above 0, or inf")
        if self.ridge is not None:
            within("compress.ridge", self.ridge, 0.0, 1.0)
        within("compress.min_keep", self.min_keep, 0.0, 1.0)
        within("compress.holdout", self.holdout, 0.0, 0.5)
        for name in ("align", "tokens", "eval_tokens", "rounds"):
            positive(f"compress.{name}", getattr(self, name))
        if self.length is not None:
            positive("compress.length", self.length)

    def keep_for(self, kind: str) -> float:
        """Return the budget of one kind of target."""
        if kind == "heads" and self.keep_heads is not None:
            return self.keep_heads
        return self.keep

    def comp_for(self, *, certifiable: bool) -> str:
        """Return the compensation for a model with or without a certificate to keep."""
        if self.comp != AUTO:
            return self.comp
        return "lsq_capped" if certifiable else "lsq"

    def ridge_for(self, tokens: int, inputs: int) -> float:
        """Return the relative ridge for a layer of ``inputs`` fitted on ``tokens``."""
        if self.ridge is not None:
            return self.ridge
        return 1e-6 if tokens >= ENOUGH_TOKENS * inputs else 1e-4

    def align_for(self, kind: str) -> int:
        """Return what the kept components of one kind of target are a multiple of."""
        return 1 if kind == "heads" else self.align

    def least_kept(self, target: Target) -> int:
        """Return the smallest number of components that a place may keep."""
        fraction = min(self.min_keep, self.keep_for(target.kind))
        least = math.ceil(fraction * target.components - 1e-9)
        return min(target.components, max(1, least, self.align_for(target.kind)))
