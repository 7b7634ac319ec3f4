"""Figures that others have published, for comparison; every row says where it was read.

Their constants come from the published formula, which is no bound for several heads, and their
accuracies from another protocol: they are never mixed with proved figures.
"""

import dataclasses
import math

PAPER = "arXiv 2507.13338 v1"
NOTEBOOK = "notebook of the reference code of arXiv 2507.13338"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published model.

    Attributes:
        task: Data set: ``shakespeare``, ``cifar10``, ``fineweb``.
        name: What it is: method and settings.
        accuracy: Validation accuracy, share.
        loss: Validation cross-entropy in nats, or None where it is not given.
        log10_reference: Decimal logarithm of the published Lipschitz constant.
        source: Where the figures were read.
    """

    task: str
    name: str
    accuracy: float
    loss: float | None = None
    log10_reference: float
    source: str


NOTES = {
    "shakespeare": "published, reference formula, unsound for 4 heads, first 1.5k characters",
    "cifar10": "published, product of float32 norms without a margin for rounding",
    "fineweb": "published, reference formula, unsound for 6 heads",
}
"""What stands beside the published figures of a task."""


def _normalised(cap: float, accuracy: float, loss: float, reference: float) -> Published:
    return Published(
        task="shakespeare",
        name=f"Muon, spectral normalise, w_max {cap:g}",
        accuracy=accuracy,
        loss=loss,
        log10_reference=math.log10(reference),
        source=NOTEBOOK,
    )


def _image(name: str, loss: float | None, accuracy: float, reference: float) -> Published:
    return Published(
        task="cifar10",
        name=name,
        accuracy=accuracy,
        loss=loss,
        log10_reference=math.log10(reference),
        source=NOTEBOOK,
    )


PUBLISHED: tuple[Published, ...] = (
    _normalised(1.0, 0.467, 1.767, 0.892),
    _normalised(1.2, 0.543, 1.485, 1.989),
    _normalised(2.6, 0.615, 1.230, 9.58e4),
    _normalised(2.8, 0.617, 1.253, 4.39e5),
    _normalised(3.0, 0.610, 1.281, 2.27e6),
    Published(
        task="shakespeare",
        name="headline: 60 % at a constant below 2",
        accuracy=0.60,
        log10_reference=math.log10(2),
        source=f"{PAPER}, abstract",
    ),
    _image("Muon, spectral weight decay 0.05", 1.558, 0.549, 56.9),
    _image("Muon, spectral hammer, w_max 4", 1.262, 0.569, 76.1),
    _image("Muon, spectral normalise, w_max 6", 1.147, 0.601, 216.6),
    _image("Muon, Stiefel, w_max 5", 1.217, 0.577, 124.4),
    _image("Muon, hard cap, w_max 5", 1.199, 0.588, 92.2),
    _image("Muon, soft cap, w_max 6", 1.185, 0.588, 115.3),
    _image("Muon, weight decay 0.1", 1.150, 0.596, 326.6),
    _image("AdamW, weight decay 0.1", None, 0.493, 7618.8),
    _image("Muon, soft cap, w_max 3", None, 0.505, 15.24),
    Published(
        task="fineweb",
        name="145M, headline: 10-Lipschitz",
        accuracy=0.21,
        log10_reference=1.0,
        source=f"{PAPER}, abstract",
    ),
    Published(
        task="fineweb",
        name="145M, accuracy of the baseline",
        accuracy=0.394,
        log10_reference=264.0,
        source=f"{PAPER}, abstract; a later version gives 10^122 at 0.374",
    ),
)


def published(task: str | None) -> tuple[Published, ...]:
    """Return the published rows of a task; none for other data."""
    return tuple(row for row in PUBLISHED if row.task == task)
