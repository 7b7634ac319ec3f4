"""What can be chosen about unlearning, validated where it enters."""

import math
from dataclasses import dataclass

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError
from compress.settings import ORDERS
from compress.unlearning.edits import EDITS
from compress.unlearning.recovery import RECOVERIES


@dataclass(frozen=True, kw_only=True, slots=True)
class UnlearnConfig:
    """Settings of one unlearning run.

    Attributes:
        forget: The class: a number (images), or a file, folder, glob or speaker (text).
        method: Name in ``edits.EDITS``.
        share: Share of the inputs per output that lose their weight; not for ``ridge``.
        mu: Weight of the class in ``ridge``; 0 changes nothing.
        push: How far beyond the mean retained output ``ridge`` moves the class at the last map, in
            units of the distance between the two mean outputs; 0 moves it there.
        ridge: Penalty of ``ridge`` on changes, relative to the mean activation energy.
        tau: Allowed growth of the norm of every edited map of a model with a certificate; 1 keeps
            the block's naive constant, ``inf`` lifts the cap.
        layers: Share of the layers that is edited, from the output backwards.
        heads: Whether attention outputs are edited, not only MLPs and convolutions.
        order: ``sequential`` edits each map on what the edited ones before it produce,
            ``one_shot`` all on the activations of the unmodified model.
        recovery: ``none``, or ``lsq``: refit what the edit left alone on retained data.
        rebound: Largest share of the forgetting that recovery may undo.
        tokens: Calibration tokens of either class, from the training part.
        images: Calibration images of either class, at most, from the training part.
        length: Tokens per sequence; the model's context by default.
        eval_tokens: Tokens of each of the four parts that are measured.
        relearn_steps: Steps of fine-tuning after which an unsuccessful return is given up; 0
            leaves the measurement out.
        relearn_lr: Their learning rate (AdamW).
        relearn_examples: Images or sequences of the class that the second attempt trains on.
        retrained: Bundle of a model trained without the class, to compare with.
        seed: Draws calibration inputs and the batches of fine-tuning.
    """

    forget: str | int
    method: str = "ridge"
    share: float = 0.2
    mu: float = 0.1
    push: float = 1.0
    ridge: float = 1e-6
    tau: float = 1.0
    layers: float = 0.5
    heads: bool = True
    order: str = "sequential"
    recovery: str = "none"
    rebound: float = 0.1
    tokens: int = 65536
    images: int = 10000
    length: int | None = None
    eval_tokens: int = 16384
    relearn_steps: int = 50
    relearn_lr: float = 1e-3
    relearn_examples: int = 16
    retrained: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        check_types(self)
        one_of("unlearn.method", self.method, EDITS)
        one_of("unlearn.order", self.order, ORDERS)
        one_of("unlearn.recovery", self.recovery, RECOVERIES)
        for name in ("share", "layers"):
            within(f"unlearn.{name}", getattr(self, name), 0.0, 1.0)
            positive(f"unlearn.{name}", getattr(self, name))
        within("unlearn.ridge", self.ridge, 0.0, 1.0)
        within("unlearn.rebound", self.rebound, 0.0, 1.0)
        for name in ("mu", "push", "relearn_steps"):
            positive(f"unlearn.{name}", getattr(self, name), zero=True)
        if not self.tau > 0 or math.isnan(self.tau):
            raise ConfigError(f"unlearn.tau={self.tau}: expected a number above 0, or inf")
        for name in ("tokens", "images", "eval_tokens", "relearn_lr", "relearn_examples"):
            positive(f"unlearn.{name}", getattr(self, name))
        if self.length is not None:
            positive("unlearn.length", self.length)
        if self.recovery == "lsq" and self.method == "ridge":
            raise ConfigError(
                "unlearn.recovery=lsq: unlearn.method=ridge leaves no weight alone, so refitting "
                "would return the original model; set unlearn.recovery=none, or lower unlearn.mu"
            )
