"""Which device a command computes on, and how many CPU cores it may use."""

import os

import torch

from common.errors import ConfigError


def resolve_device(name: str) -> str:
    """Return ``cpu``, ``cuda`` or ``cuda:N`` for a setting; ``auto`` takes CUDA when there is one.

    Raises:
        ConfigError: for another name, or a CUDA device that is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N")
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use device=auto"
        )
    return name


def usable_cpus() -> int:
    """Return how many CPU cores this process may use; 1 where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
