"""The Lightning trainer that a configuration asks for."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy

from common.device import resolve_device, usable_cpus
from common.errors import ConfigError
from train.progress import Bar
from train.settings import TrainerConfig

# What torchrun, SLURM, LSF and hand-started ranks set on every node.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "LSB_JOBID", "LOCAL_RANK")


def build_trainer(
    loop: TrainerConfig, device: str, callbacks: list[L.Callback], loggers: list[Any]
) -> L.Trainer:
    """Return the Lightning trainer of a configuration; it counts optimizer steps, not epochs."""
    accelerator, devices = accelerator_and_devices(device, loop.devices, loop.num_nodes)
    has_bar = sys.stdout.isatty()
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=loop.num_nodes,
        strategy=_strategy(loop),
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
        callbacks=[*callbacks, Bar()] if has_bar else callbacks,
        logger=loggers,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=has_bar,
        use_distributed_sampler=False,
    )


def accelerator_and_devices(
    device: str, devices: int | str, num_nodes: int = 1
) -> tuple[str, int | str | list[int]]:
    """Return Lightning's accelerator and devices for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: for another name, CUDA where there is none, more devices than there are, or
            several nodes without a launcher, which would wait for each other for ever.
    """
    if num_nodes > 1 and not any(name in os.environ for name in LAUNCHERS):
        raise ConfigError(
            f"trainer.num_nodes={num_nodes}: nothing started this process on every node; use "
            f"torchrun --nnodes {num_nodes} --nproc-per-node DEVICES --no-python lipllm train ..., "
            "or srun"
        )
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
    cores = usable_cpus()
    if kind == "cpu" and isinstance(devices, int) and devices > cores:
        raise ConfigError(
            f"trainer.devices={devices}: this machine offers {cores} CPU cores, one per process; "
            f"use trainer.devices={cores} or fewer"
        )
    return kind, [int(index)] if index else devices


def _strategy(loop: TrainerConfig) -> str | Strategy:
    if loop.strategy != "fsdp2":
        return loop.strategy
    from train.fsdp import RowSharding

    return RowSharding()


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
        # Nothing here writes into a module's output.
        warnings.filterwarnings("ignore", message="(?s).*returned a view tensor.*")
        try:
            yield
        finally:
            framework.setLevel(level)
