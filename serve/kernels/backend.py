"""Whether a call runs on Triton or on torch."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from common.config import one_of
from common.errors import BackendError

log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")


def use_triton(backend: str, pool: Tensor) -> bool:
    """Return True if the kernels that work on ``pool`` are Triton's.

    Raises:
        ConfigError: for an unknown backend.
        BackendError: if Triton is asked for and is missing, or has no device to run on.
    """
    one_of("backend", backend, BACKENDS)
    is_double = pool.dtype == torch.float64
    if backend == "torch" or (backend == "auto" and (is_double or not pool.is_cuda)):
        return False
    if backend == "auto":
        return _is_installed_or_warned()
    if not _is_installed():
        raise BackendError("backend=triton: triton is not installed; pip install triton")
    if not pool.is_cuda and not _is_interpreted():
        raise BackendError(
            f"backend=triton: the cache is on {pool.device}, expected a CUDA device;"
            " use backend=auto or backend=torch"
        )
    if is_double:
        raise BackendError("backend=triton: the kernels have no float64; use backend=torch")
    return True


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _is_installed_or_warned() -> bool:
    if not _is_installed():
        log.warning("triton is not installed: the kernels of the cache run on torch")
    return _is_installed()


def _is_interpreted() -> bool:
    from serve.kernels.launch import INTERPRETED

    return INTERPRETED
