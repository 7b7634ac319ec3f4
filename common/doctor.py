"""What this machine can run, and what would make it faster."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.device import usable_cpus
from common.errors import ConfigError
from common.ledger import versions
from common.locate import shipped_bundles
from common.runs import Outcome, Run, hydra_command

EXTRAS = {
    "triton": "GPU kernels (part of the installation on Linux)",
    "datasets": "parquet, jsonl and hub corpora (part of the installation)",
    "wandb": "experiment tracking (part of the installation)",
    "tokenizers": "BPE tokenizers: pip install 'lipllm[hf]'",
    "hydra_plugins.hydra_joblib_launcher": "parallel sweeps: pip install 'lipllm[sweep]'",
    "hydra_plugins.hydra_submitit_launcher": "sweeps on SLURM: pip install 'lipllm[slurm]'",
    "wandb_workspaces": "dashboards as code: pip install 'lipllm[dashboards]'",
}

_MIN_FREE_BYTES = 2**30


def is_installed(module: str) -> bool:
    """Return whether ``module`` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def hints(folder: Path) -> Iterator[str]:
    """Yield advice for this machine.

    Args:
        folder: Where runs will be written.
    """
    if torch.get_num_threads() < usable_cpus():
        yield f"torch uses {torch.get_num_threads()} of {usable_cpus()} CPUs: unset OMP_NUM_THREADS"
    if shutil.disk_usage(folder).free < _MIN_FREE_BYTES:
        yield f"less than 1 GiB is free in {folder}: runs may fail while writing"
    if not torch.cuda.is_available():
        yield "no CUDA device: kernels run as vectorised torch code on the CPU"
    elif not is_installed("triton"):
        yield "CUDA without triton: pip install triton"


def doctor(cfg: Any, run: Run) -> Outcome:
    """Print versions, devices, shipped models, extras and advice.

    Raises:
        ConfigError: if the run directory cannot be written to.
    """
    if not os.access(run.directory, os.W_OK):
        raise ConfigError(f"{run.directory} is not writable: choose hydra.run.dir=DIR")
    lines = [f"{name:<14} {version}" for name, version in versions().items()]
    lines.append(f"{'cpu threads':<14} {torch.get_num_threads()}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines += [f"{'cuda':<14} {cuda}", f"{'runs in':<14} {run.directory.parent}", ""]
    shipped = ", ".join(shipped_bundles()) or "none"
    lines[-1:] = [f"{'models':<14} {shipped}", ""]
    for module, purpose in EXTRAS.items():
        mark = "yes" if is_installed(module) else "no"
        lines.append(f"{module.rpartition('.')[2]:<24} {mark:<4} {purpose}")
    lines += ["", *(f"hint: {hint}" for hint in hints(run.directory))]
    sys.stdout.write("\n".join(lines) + "\n")
    return Outcome()


main = hydra_command("doctor", doctor)
