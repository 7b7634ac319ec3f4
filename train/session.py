"""What every training run shares, whatever it is trained on: settings, the fit, and its end."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import nn

from common.bundle import save_bundle
from common.certificate import Certificate
from common.config import build, one_of
from common.corpus import Corpus
from common.ledger import Run
from common.provenance import describe_training, portable_command
from common.tokenizer import Tokenizer
from common.tracking import build_loggers
from train.callbacks import CHECKPOINT
from train.groups import Constraint, OptimConfig
from train.loop import accelerator_and_devices, build_trainer, quiet
from train.schedules import Schedule
from train.settings import CallbacksConfig, TrainerConfig

# Types of stored weights; None keeps the model's own.
STORED = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every settings object of a training run, validated before any work."""

    seed: int
    device: str
    optim: OptimConfig
    constraint: Constraint
    schedule: Schedule
    trainer: TrainerConfig
    callbacks: CallbacksConfig


def read_settings(cfg: DictConfig) -> Settings:
    """Build and validate the settings objects of a configuration.

    Raises:
        ConfigError: for the first impossible value.
    """
    trainer: TrainerConfig = build(cfg.trainer)
    accelerator_and_devices(cfg.device, trainer.devices, trainer.num_nodes)
    return Settings(
        seed=cfg.seed,
        device=cfg.device,
        optim=build(cfg.optim),
        constraint=build(cfg.constraint),
        schedule=build(cfg.schedule),
        trainer=trainer,
        callbacks=build(cfg.callbacks),
    )


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    callbacks: list[L.Callback],
    settings: Settings,
    cfg: DictConfig,
    run: Run,
) -> L.Trainer:
    """Train a module to the end; a resumed run continues from its last checkpoint.

    Args:
        module: Holds the model, which is trained in place.
        data: Stateful: its position is part of the checkpoint.
        callbacks: In order; the one that writes checkpoints comes last.
        settings: Loop and device.
        cfg: For its group ``logger``.
        run: Where.
    """
    loggers = build_loggers(build(cfg.logger), run.directory, run)
    with quiet():
        trainer = build_trainer(settings.trainer, settings.device, callbacks, loggers)
        trainer.fit(module, datamodule=data, ckpt_path=_checkpoint(run), weights_only=True)
    return trainer


def finished(module: Any, trainer: L.Trainer, settings: Settings) -> Any:
    """Return the model to evaluate and store, on the device of the run; every rank calls it.

    Its weights are already rounded to what is stored, so that every figure is of that model.
    """
    model = module.whole().eval().to(trainer.strategy.root_device)
    dtype = STORED[settings.trainer.save_dtype]
    if dtype is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
    return model


def module_options(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of ``ConstrainedModule`` that the loop's settings decide."""
    loop = settings.trainer
    return {"total_steps": loop.max_steps, "ema": loop.ema, "shard_updates": loop.shard_updates}


def log_final(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Hand the figures of the finished run to every logger and close it."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.finalize("success")


def store(
    run: Run,
    model: nn.Module,
    settings: Settings,
    *,
    tokenizer: Tokenizer | None = None,
    corpus: Corpus | None = None,
    certificate: Certificate | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write the bundle of a run with its provenance and return its folder.

    Args:
        run: Where, and its configuration hash.
        model: The trained model.
        settings: For the seed and the stored precision.
        tokenizer: Of a language model.
        corpus: What it was trained on, where that is text.
        certificate: Proof to store with the model.
        metrics: Final figures, kept with the model.
    """
    # A stage of a pipeline is repeated by repeating the pipeline that the user typed.
    typed = HydraConfig.get().job.name if HydraConfig.initialized() else run.command
    bundle, command = run.directory / "bundle", portable_command(typed, sys.argv[1:])
    figures = {k: float(v) for k, v in (metrics or {}).items() if math.isfinite(v)}
    facts = {"config_hash": run.config_hash, "metrics": figures}
    history = describe_training(command=command, seed=settings.seed, corpus=corpus, facts=facts)
    dtype = STORED[settings.trainer.save_dtype]
    save_bundle(
        bundle,
        model,
        tokenizer,
        certificate=certificate,
        provenance=history,
        command=command,
        dtype=dtype,
    )
    return bundle


def compiled(model: Any, settings: Settings) -> Any:
    """Return the model, compiled in place where the settings ask for it.

    Raises:
        ConfigError: for a backend that torch does not have.
    """
    if settings.trainer.compile:
        backend = settings.trainer.compile_backend
        # torch itself would say so only at the first step.
        if backend not in torch.compiler.list_backends(exclude_tags=()):
            one_of("trainer.compile_backend", backend, torch.compiler.list_backends())
        model.compile(backend=backend)
    return model


def _checkpoint(run: Run) -> Path | None:
    path = run.directory / "checkpoints" / CHECKPOINT
    return path if run.resumed and path.is_file() else None
