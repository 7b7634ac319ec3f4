"""The Lightning trainer that a configuration asks for."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from common.device import resolve_device
from common.errors import ConfigError
from train.settings import TrainerConfig


def build_trainer(
    loop: TrainerConfig, device: str, callbacks: list[L.Callback], loggers: list[Any]
) -> L.Trainer:
    """Return the Lightning trainer of a configuration; it counts optimizer steps, not epochs."""
    accelerator, devices = accelerator_and_devices(device, loop.devices)
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=loop.num_nodes,
        strategy=loop.strategy,
        precision=loop.precision,
        max_steps=loop.max_steps,
        accumulate_grad_batches=loop.accumulate_grad_batches,
        gradient_clip_val=loop.gradient_clip_val,
        deterministic=loop.deterministic,
        val_check_interval=(loop.val_every or 1) * loop.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if loop.val_every else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        use_distributed_sampler=False,
    )


def accelerator_and_devices(device: str, devices: int | str) -> tuple[str, int | str | list[int]]:
    """Return Lightning's accelerator and devices for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: for another name, CUDA where there is none, or more devices than there are.
    """
    kind, _, index = resolve_device(device).partition(":")
    if index and devices not in (1, "auto"):
        raise ConfigError(
            f"trainer.devices={devices}: device={device} names one; use device=cuda for several"
        )
    if kind == "cuda" and isinstance(devices, int) and devices > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} CUDA "
            "devices; use trainer.devices=auto"
        )
    return kind, [int(index)] if index else devices


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice off the screen; its warnings about hardware stay in the log."""
    framework = logging.getLogger("lightning.pytorch")
    level = framework.level
    framework.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*was previously set for.*")
        try:
            yield
        finally:
            framework.setLevel(level)
