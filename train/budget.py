"""A budget for the whole certificate: the head gets what the blocks leave of it.

The constant of a network is at most that of its blocks together times that of its head. Training
under a budget proves the blocks again and again and gives the head the rest as its cap, so that
slack which a tightened bound finds becomes logits. The finished model obeys the budget exactly.
"""

import dataclasses
import logging
import math
from typing import Any

import lightning as L
import torch

from common.certificate import Certificate
from common.config import check_types, positive, within
from common.errors import CertificateError
from common.models import LipschitzTransformer
from solvers.bounds import certify
from train.groups import HEAD
from train.progress import EachStep, log_metrics

log = logging.getLogger(__name__)

# Share of the budget left for the rounding of capped float32 weights.
MARGIN = 1e-5
# Rounding a rescaled head to bfloat16 may add this much to its norm, relative.
ROUNDING = 4e-3
# Below the first, float32 logits would say nothing.
TARGETS = (1e-6, 1e12)
_ATTEMPTS = 9
# A head times less than this would lose digits to underflow, and predictions would change.
_SMALLEST = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Largest certified constant of the trained model.

    Attributes:
        target: Embedding RMS to logits RMS, above 0; None for no budget.
        tighten: Measure the blocks by the tightened bound instead of operator norms.
        every: Optimizer steps between adjustments of the head's cap.
    """

    target: float | None = None
    tighten: bool = True
    every: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        if self.target is not None:
            within("trainer.budget.target", self.target, *TARGETS)
        positive("trainer.budget.every", self.every)


class KeepBudget(EachStep):
    """Sets the head's cap to what the blocks leave of the budget.

    Args:
        budget: With a target.
    """

    def __init__(self, budget: Budget):
        super().__init__(budget.every)
        self.budget = budget

    def on_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Prove the blocks and change the cap; every rank proves the same."""
        model = pl_module.whole()
        certificate = certify(model, self.budget.tighten)
        if not certificate.stream:
            return  # Nothing passes such a block: every head is within the budget.
        cap = head_cap(certificate, model, self.budget)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if HEAD in group["names"]:
                    group["w_max"] = cap
        log_metrics(trainer, {"train/head_cap": cap})


def head_cap(certificate: Certificate, model: LipschitzTransformer, budget: Budget) -> float:
    """Return the RMS->RMS norm that the head may have beside the certified blocks (none is 0)."""
    config = model.config
    # Surplus rows count in the norm of the head, but not among the logits.
    share = math.sqrt(config.vocab_size / config.head_rows)
    return budget.target * (1 - MARGIN) * share / config.final_scale / certificate.stream


@torch.no_grad()
def enforce(
    model: LipschitzTransformer, budget: Budget, dtype: torch.dtype | None = None
) -> Certificate:
    """Shrink the logits until the certificate is within the budget; return that certificate.

    Weight and bias of the head shrink by the same factor, so that no prediction changes.

    Args:
        model: Modified in place; its weights already have values of ``dtype``.
        budget: With a target.
        dtype: Type that the weights will be stored in; None for their own.

    Raises:
        CertificateError: if a weight is not finite, or no head with digits left is within.
    """
    margin = MARGIN if dtype is None else ROUNDING
    for _ in range(_ATTEMPTS):
        certificate = certify(model, budget.tighten)
        if certificate.tightened <= budget.target:
            return certificate
        factor = budget.target / certificate.tightened * (1 - margin)
        if factor < _SMALLEST:
            break
        log.info("head scaled by %.6f: %.6g is above the budget", factor, certificate.tightened)
        for parameter in model.head.parameters():
            parameter.mul_(factor)
            if dtype is not None:
                parameter.copy_(parameter.to(dtype))
        margin *= 2
    raise CertificateError(
        f"tightened=1e{certificate.log10_tightened:.1f}: expected at most trainer.budget.target="
        f"{budget.target:g}, and no smaller head can bring it there; train under a constraint"
    )
