"""What one model knows of the class to forget and of the rest, and how firmly it has forgotten.

Forgetting is measured at the output. It is not erasure: relearning steps and the probe of the last
hidden layer say how soon and how well the class is still found.
"""

import dataclasses
import logging

from compress.unlearning.measure import Examined, probe
from compress.unlearning.membership import Membership, attack_membership
from compress.unlearning.relearning import checked, relearning_curve, steps_to
from compress.unlearning.samples import shuffled
from compress.unlearning.settings import UnlearnConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Relearning:
    """Steps of fine-tuning that undo half of the forgetting; None where the limit did not do.

    Attributes:
        retain: On retained data only.
        forget: On a few samples of the class.
        goal: Accuracy or bits per byte of held-out samples of the class at which half is back.
        retain_curve: The same figure after 0, 1, 2 ... steps on retained data, up to the goal.
        forget_curve: After steps on a few samples of the class.
    """

    retain: int | None
    forget: int | None
    goal: float
    retain_curve: tuple[float, ...]
    forget_curve: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Standing:
    """What one model knows of the class and of the rest.

    Attributes:
        figures: Accuracy or bits per byte of every part, by ``Examined.figures``.
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
    found: Examined, dense: Examined | None = None, settings: UnlearnConfig | None = None
) -> Standing:
    """Measure a model.

    Args:
        found: The model on the data.
        dense: The model before, from which the forgetting counts that relearning undoes.
        settings: Of the relearning; None leaves it out.
    """
    data, figures = found.data, found.figures()
    log.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    membership = None
    if data.is_unseen:
        parts = (found.on("forget_train"), found.on("forget_held"))
        membership = attack_membership(*(part.losses_N for part in parts))
    relearning = None
    if dense is not None and settings is not None and settings.relearn_steps:
        relearning = _relearning(dense, found, settings)
    return Standing(
        figures=figures,
        membership=membership,
        probe=None if data.is_text else probe(found.model, data),
        relearning=relearning,
    )


def _relearning(dense: Examined, found: Examined, settings: UnlearnConfig) -> Relearning:
    data, count = found.data, checked(found.data.forget_held)
    known, left = (each.on("forget_held").first(count).knowledge for each in (dense, found))
    goal = (known + left) / 2
    few = shuffled(data.forget_train, settings.relearn_examples, settings.seed)
    retain, forget = (
        relearning_curve(
            found.model,
            train,
            data.forget_held.first(count),
            start=left,
            goal=goal,
            limit=settings.relearn_steps,
            lr=settings.relearn_lr,
            seed=settings.seed,
        )
        for train in (data.retain_train, few)
    )
    sign = -1 if data.is_text else 1
    return Relearning(
        retain=steps_to(goal, retain),
        forget=steps_to(goal, forget),
        goal=sign * goal,
        retain_curve=tuple(sign * value for value in retain),
        forget_curve=tuple(sign * value for value in forget),
    )
