"""Learning-rate schedules: one factor in [0, 1] per optimizer step, shared by all groups."""

import math
from dataclasses import dataclass
from typing import Literal

from common.config import check_types, within


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Warm-up, hold, decay.

    Attributes:
        kind: ``linear``, ``cosine`` or ``constant``: the shape of the decay.
        warmup: Share of all steps over which the factor rises linearly, 0 to 1.
        hold: Share of all steps after the warm-up at factor 1 before the decay starts, 0 to 1.
        final: Factor at the end of the decay, 0 to 1.
    """

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    hold: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        within("schedule.warmup", self.warmup, 0.0, 1.0)
        within("schedule.hold", self.hold, 0.0, 1.0 - self.warmup)
        within("schedule.final", self.final, 0.0, 1.0)

    def factor(self, step: int, total: int) -> float:
        """Return the factor of optimizer step ``step`` (from 0) out of ``total``.

        The first step already moves (no factor 0 in a warm-up); without warm-up and hold the
        linear decay is ``(total - step) / total``.
        """
        warmup = round(self.warmup * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        start = warmup + round(self.hold * total)
        if self.kind == "constant" or step < start:
            return 1.0
        progress = min((step - start) / max(total - start, 1), 1.0)
        if self.kind == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return 1.0 + (self.final - 1.0) * progress
