"""LightningModules: one constrained optimizer, averaged weights, losses and validation figures."""

# Legend: B batch, T token position.

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from common.models import LipschitzTransformer
from train.evaluate import bits_per_byte, inputs_and_targets, loss_and_hits, mean_loss
from train.groups import Constraint, OptimConfig, optimizer_defaults, parameter_groups
from train.schedules import Schedule
from train.sharding import ShardedMuon


class ConstrainedModule(L.LightningModule):
    """What every training shares, whatever its loss: optimizer, schedule, averaged weights.

    Args:
        model: The model; already initialised. It has a ``config`` that builds another one.
        optim: Updates.
        constraint: Caps, applied inside every optimizer step.
        schedule: Learning-rate factor over ``total_steps``.
        total_steps: Optimizer steps of the whole run.
        ema: Decay of the average of the weights per optimizer step, 0 for none. The average is
            what ``evaluated`` returns; being convex it obeys every cap that all steps obeyed.
        shard_updates: Share the optimizer's matrix work out over ranks.
    """

    def __init__(
        self,
        model: Any,
        optim: OptimConfig,
        constraint: Constraint,
        schedule: Schedule,
        *,
        total_steps: int,
        ema: float = 0.0,
        shard_updates: bool = True,
    ):
        super().__init__()
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.optim, self.constraint, self.schedule = optim, constraint, schedule
        self.total_steps, self.ema, self.shard_updates = total_steps, ema, shard_updates

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.model(inputs)

    @property
    def evaluated(self) -> Any:
        """The model that is validated, certified and stored: the average where there is one."""
        return self.model if self.average is None else self.average

    def whole(self) -> Any:
        """Return ``evaluated`` with whole parameters; every rank has to call it.

        A copy if parameters are sharded over ranks, the model itself otherwise.
        """
        model = self.evaluated
        if not any(isinstance(p, DTensor) for p in model.parameters()):
            return model
        with torch.no_grad():
            state = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
        plain = _plain_class(model)(model.config)
        plain.load_state_dict(state)
        return plain.to(next(iter(state.values())).device).train(model.training)

    def configure_model(self) -> None:
        """Shard the parameters over ranks where the strategy is FSDP2; layer by layer."""
        if not _shards_parameters(self.trainer) or isinstance(next(self.parameters()), DTensor):
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for model in (self.model, self.average):
            if model is not None:
                for layer in getattr(model, "layers", ()):
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer and its schedule, one factor per optimizer step."""
        groups = parameter_groups(self.model, self.optim, self.constraint)
        settings = optimizer_defaults(self.optim, self.constraint)
        optimizer = ShardedMuon(groups, shard=self.shard_updates, **settings)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then move the average; the first steps weigh more, so that the start is forgotten.

        Step n from 0 keeps ``min(ema, (1 + n) / (10 + n))`` of the average.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.average is not None:
            step = self.trainer.global_step
            decay = min(self.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                mean = [_local(p) for p in self.average.parameters()]
                torch._foreach_lerp_(mean, [_local(p) for p in self.model.parameters()], 1 - decay)


class LipschitzModule(ConstrainedModule):
    """Trains a ``LipschitzTransformer`` on next tokens under weight constraints.

    Args:
        model: The model; already initialised.
        optim: Updates.
        constraint: Caps, applied inside every optimizer step.
        schedule: Learning-rate factor over ``total_steps``.
        total_steps: Optimizer steps of the whole run.
        bytes_per_token: For bits per byte.
        **options: Further ones of ``ConstrainedModule``.
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
        **options: Any,
    ):
        super().__init__(model, optim, constraint, schedule, total_steps=total_steps, **options)
        self.bytes_per_token = bytes_per_token

    def training_step(self, batch_BT: Tensor, batch_idx: int) -> Tensor:
        """Return the mean loss (nats per token) of a batch (B, T + 1) and count the batch."""
        inputs_BT, targets_BT = inputs_and_targets(batch_BT)
        loss = mean_loss(self.model(inputs_BT), targets_BT)
        self.trainer.datamodule.consumed += 1
        return loss

    def validation_step(self, batch_BT: Tensor, batch_idx: int) -> None:
        """Accumulate loss and accuracy of a batch (B, T + 1)."""
        inputs_BT, targets_BT = inputs_and_targets(batch_BT)
        loss, hits = loss_and_hits(self.evaluated(inputs_BT), targets_BT)
        options: dict[str, Any] = {"batch_size": len(batch_BT), "sync_dist": True, "logger": False}
        bits = bits_per_byte(1.0, self.bytes_per_token) * loss
        self.log("train/val_loss_nats", loss, **options)
        self.log("train/val_bits_per_byte", bits, prog_bar=True, **options)
        self.log("train/val_acc_full", hits, **options)


def _shards_parameters(trainer: L.Trainer) -> bool:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return isinstance(trainer.strategy, ModelParallelStrategy)


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain_class(model: nn.Module) -> Any:
    # fully_shard replaces a module's class by a subclass of it.
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
