"""What one model knows of the class to forget and of the rest, and how firmly it has forgotten.

Forgetting is measured at the output. It is not erasure: relearning steps and the probe of the last
hidden layer say how soon and how well the class is still found.
"""

import dataclasses
import logging
from typing import Any

from compress.unlearning.measure import figures, losses, probe
from compress.unlearning.membership import Membership, attack_membership
from compress.unlearning.relearning import relearning_steps
from compress.unlearning.samples import ClassData, shuffled
from compress.unlearning.settings import UnlearnConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Relearning:
    """Steps of fine-tuning that undo half of the forgetting; None where the limit did not do.

    Attributes:
        retain: On retained data only.
        forget: On a few samples of the class.
    """

    retain: int | None
    forget: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Standing:
    """What one model knows of the class and of the rest.

    Attributes:
        figures: Accuracy or bits per byte of every part, by ``measure.figures``.
        membership: Inference on the class; None where no sample of it was held out.
        probe: Share of the class that a probe of the last hidden layer finds; None for text.
        relearning: Steps back to half of the forgetting; None for the model before, and where it
            was not asked for.
    """

    figures: dict[str, float]
    membership: Membership | None
    probe: float | None
    relearning: Relearning | None


def measure_standing(
    model: Any, data: ClassData, dense: Any = None, settings: UnlearnConfig | None = None
) -> Standing:
    """Measure a model; relearning is counted from the forgetting since ``dense``."""
    found = figures(model, data)
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    membership = None
    if data.is_unseen:
        parts = (data.forget_train, data.forget_held)
        membership = attack_membership(*(losses(model, part) for part in parts))
    return Standing(
        figures=found,
        membership=membership,
        probe=None if data.is_text else probe(model, data),
        relearning=None if settings is None else _relearning(dense, model, data, settings),
    )


def _relearning(
    dense: Any, model: Any, data: ClassData, settings: UnlearnConfig
) -> Relearning | None:
    if not settings.relearn_steps:
        return None
    few = shuffled(data.forget_train, settings.relearn_examples, settings.seed)
    retain, forget = (
        relearning_steps(
            dense,
            model,
            train,
            data.forget_held,
            limit=settings.relearn_steps,
            lr=settings.relearn_lr,
            seed=settings.seed,
        )
        for train in (data.retain_train, few)
    )
    return Relearning(retain=retain, forget=forget)
