"""The LightningModule: next-token loss, validation figures, one constrained optimizer."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from common.models import LipschitzTransformer
from train.evaluate import bits_per_byte, loss_and_hits
from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups
from train.optim import Muon
from train.schedules import Schedule


class LipschitzModule(L.LightningModule):
    """Trains a ``LipschitzTransformer`` under weight constraints.

    Args:
        model: The model; already initialised.
        optim: Updates.
        constraint: Caps, applied inside every optimizer step.
        schedule: Learning-rate factor over ``total_steps``.
        total_steps: Optimizer steps of the whole run.
        bytes_per_token: For bits per byte.
    """

    def __init__(
        self,
        model: LipschitzTransformer,
        optim: OptimConfig,
        constraint: Constraint,
        schedule: Schedule,
        *,
        total_steps: int,
        bytes_per_token: float = 1.0,
    ):
        super().__init__()
        self.model = model
        self.optim, self.constraint, self.schedule = optim, constraint, schedule
        self.total_steps, self.bytes_per_token = total_steps, bytes_per_token

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits (B, T, V)."""
        return self.model(tokens_BT)

    def training_step(self, batch_BT: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss (nats per token) of a batch (B, T + 1) and count the batch."""
        loss, _ = loss_and_hits(self.model, batch_BT)
        self.trainer.datamodule.consumed += 1
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch_BT: Tensor, batch_idx: int) -> None:
        """Accumulate loss and accuracy of a batch (B, T + 1)."""
        loss, hits = loss_and_hits(self.model, batch_BT)
        options: dict[str, Any] = {"batch_size": len(batch_BT), "sync_dist": True, "logger": False}
        bits = bits_per_byte(1.0, self.bytes_per_token) * loss
        self.log("train/val_loss_nats", loss, **options)
        self.log("train/val_bits_per_byte", bits, prog_bar=True, **options)
        self.log("train/val_acc_full", hits, **options)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and its schedule, one factor per optimizer step."""
        groups = parameter_groups(self.model, self.optim, self.constraint)
        optimizer = Muon(groups, **optimizer_defaults(self.optim, self.constraint))
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
