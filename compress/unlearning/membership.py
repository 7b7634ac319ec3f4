"""Membership inference: can the loss tell what of a class a model was trained on?

The attack of a stranger who sees only losses. Where it fails on the model before unlearning there
is nothing to protect, and the figure afterwards says nothing: ``is_attackable`` tells.
"""

# Legend: N samples.

import dataclasses
import math

import torch
from torch import Tensor

DEVIATIONS = 2.0
"""Standard errors above one half from which an attack counts."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """An attack by thresholds on the loss.

    Attributes:
        auc: Probability (estimate) that a trained sample has a lower loss than a held-out one; 0.5
            is guessing.
        error: Standard error of it if the losses told nothing.
    """

    auc: float
    error: float

    @property
    def is_attackable(self) -> bool:
        """Whether the attack beats guessing by more than chance explains."""
        return self.auc - 0.5 > DEVIATIONS * self.error


def attack_membership(trained_N: Tensor, held_N: Tensor) -> Membership:
    """Return how well a threshold on the loss separates trained from held-out samples.

    Args:
        trained_N: Losses of samples that were trained on.
        held_N: Losses of samples of the same class that were not.
    """
    all_N, trained, held = torch.cat([trained_N, held_N]).double(), len(trained_N), len(held_N)
    _, place_N, count_N = torch.unique(all_N, return_inverse=True, return_counts=True)
    # Ties share their mean rank.
    last_N = count_N.cumsum(0).double()
    ranks_N = (last_N - (count_N - 1) / 2)[place_N]
    below = float(ranks_N[trained:].sum()) - held * (held + 1) / 2
    return Membership(
        auc=below / (trained * held),
        error=math.sqrt((trained + held + 1) / (12 * trained * held)),
    )
