"""Training an image classifier: pixels in, a constrained MLP and its figures out."""

# Legend: N images, B batch, I pixels.

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from common.errors import ConfigError
from common.files import write_json
from common.images import ImageConfig, Images, load_images
from common.ledger import Outcome, Run
from common.models import LipschitzMLP, MLPConfig
from solvers.bounds import certify
from train.callbacks import Certify, Checkpoint
from train.evaluate import evaluate, loss_and_hits, mean_loss
from train.groups import parameter_groups
from train.image_data import ImageDataModule
from train.init import initialise
from train.margins import MARGINS_FILE, image_margins
from train.module import ConstrainedModule
from train.probes import certificate_figures, matrix_norms
from train.progress import Progress
from train.session import (
    Settings,
    compiled,
    finished,
    fit,
    log_final,
    module_options,
    store,
)

log = logging.getLogger(__name__)

# Validation images on which the largest activation is measured.
PROBE_IMAGES = 256
# Training images per forward pass of the last figures.
READ_AT_ONCE = 1024


def train_images(
    cfg: DictConfig, source: ImageConfig, shape: MLPConfig, settings: Settings, run: Run
) -> Outcome:
    """Train an MLP on the images of ``source`` and write its bundle.

    Args:
        cfg: Group ``logger``.
        source: Which images.
        shape: Hidden layers of the model.
        settings: Everything else, without a budget; the name pattern ``head`` means the last
            matrix. Window counts do not apply: the whole validation split is always read.
        run: Where; a resumed run continues from its last checkpoint.

    Returns:
        Loss and accuracy on both parts, speed, naive bound; the artifact ``bundle``; the
        objective is the share of wrong answers on the validation split. Nothing on the ranks that
        do not lead.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    loop = settings.trainer
    if loop.budget.target is not None:
        raise ConfigError(
            f"trainer.budget.target={loop.budget.target:g}: expected null, only a language model "
            "has a budget; lower constraint.w_max"
        )
    images = load_images(source)
    module, data = _module_and_data(images, shape, settings)
    progress = ImageProgress(settings.callbacks.log_every)
    callbacks: list[L.Callback] = [
        progress,
        Certify(settings.callbacks.certificate_every, partial(_maxima, images.val_NI)),
        Checkpoint(settings.callbacks.checkpoint_every, run.directory / "checkpoints"),
    ]
    trainer = fit(module, data, callbacks, settings, cfg, run)
    model = finished(module, trainer, settings)
    if not trainer.is_global_zero:
        return Outcome()  # The leading rank alone measures, proves and stores the model.
    certificate = certify(model, tighten=loop.certify == "tightened")
    metrics = _final_metrics(model, images, settings) | certificate_figures(certificate)
    metrics |= {
        "train/params": model.num_parameters,
        "train/steps": trainer.global_step,
        "train/images_seen": data.consumed * trainer.world_size * data.batch_size,
        "train/images_per_s": progress.tokens_per_s,
    }
    log_final(trainer, metrics)
    margins = image_margins(model, images.val_NI, images.val_labels_N)
    write_json(run.directory / MARGINS_FILE, margins)
    proof = certificate if certificate.multipliers else None
    bundle = store(run, model.cpu(), settings, certificate=proof, metrics=metrics)
    log.info(
        "accuracy %.4f, naive bound %.4g, largest norm %.4f",
        metrics["train/val_acc_full"],
        metrics["cert/naive"],
        max(matrix_norms(model).values()),
    )
    objective = 1 - metrics["train/val_acc_full"]
    return Outcome(metrics=metrics, artifacts={"bundle": bundle}, objective=objective)


def _module_and_data(
    images: Images, shape: MLPConfig, settings: Settings
) -> tuple["ImageModule", ImageDataModule]:
    model = shape.build(images.inputs, images.classes)
    settings = with_last_layer(settings, model)
    parameter_groups(model, settings.optim, settings.constraint)
    initialise(model, settings.constraint, settings.seed)
    module = ImageModule(
        compiled(model, settings),
        settings.optim,
        settings.constraint,
        settings.schedule,
        **module_options(settings),
    )
    loop = settings.trainer
    data = ImageDataModule(
        images, loop.batch_size, seed=settings.seed, val_batch_size=loop.val_batch_size
    )
    return module, data


class ImageModule(ConstrainedModule):
    """Trains a ``LipschitzMLP``; batches are pixels (B, I) and labels (B,)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss (nats per image) of a batch and count the batch."""
        x_BI, labels_B = batch
        loss = mean_loss(self.model(x_BI), labels_B)
        self.trainer.datamodule.consumed += 1
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accumulate loss and accuracy of a batch."""
        x_BI, labels_B = batch
        loss, hits = loss_and_hits(self.evaluated(x_BI), labels_B)
        options: dict[str, Any] = {"batch_size": len(x_BI), "sync_dist": True, "logger": False}
        self.log("train/val_loss_nats", loss, **options)
        self.log("train/val_acc_full", hits, prog_bar=True, **options)


class ImageProgress(Progress):
    """Counts images where text training counts tokens."""

    speed = "train/images_per_s"
    headline = ("train/val_acc_full", "accuracy", "images/s")

    def amount(self, batch: Any) -> int:
        """Return the images in a batch of one rank."""
        return len(batch[0])


@torch.no_grad()
def max_activation(model: LipschitzMLP, x_BI: Tensor) -> float:
    """Return the largest absolute entry of a hidden activation or logit on images (B, I)."""
    x_BI = x_BI.to(next(model.parameters()).device)
    largest = 0.0
    for linear in model.linears[:-1]:
        x_BI = model.activate(linear(x_BI))
        largest = max(largest, float(x_BI.abs().max()))
    return max(largest, float(model.linears[-1](x_BI).abs().max()))


def _maxima(images_NI: Tensor, model: LipschitzMLP) -> dict[str, float]:
    return {"train/max_activation": max_activation(model, images_NI[:PROBE_IMAGES])}


def _final_metrics(model: LipschitzMLP, images: Images, settings: Settings) -> dict[str, float]:
    size = settings.trainer.val_batch_size
    nats, accuracy = evaluate(model, images.val_NI, images.val_labels_N, size)
    _, train_accuracy = evaluate(model, images.train_NI, images.train_labels_N, READ_AT_ONCE)
    return {
        "train/val_loss_nats": nats,
        "train/val_acc_full": accuracy,
        "train/acc_train": train_accuracy,
    }


def with_last_layer(settings: Settings, model: LipschitzMLP) -> Settings:
    """Return the settings with the name pattern ``head`` meaning the last matrix."""
    last = f"linears.{len(model.linears) - 1}."

    def renamed(patterns: Mapping[str, Any]) -> dict[str, Any]:
        return {last if name == "head" else name: value for name, value in patterns.items()}

    optim, constraint = settings.optim, settings.constraint
    return dataclasses.replace(
        settings,
        optim=dataclasses.replace(optim, target_factors=renamed(optim.target_factors)),
        constraint=dataclasses.replace(
            constraint, caps=renamed(constraint.caps), kinds=renamed(constraint.kinds)
        ),
    )
