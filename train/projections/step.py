"""What a weight constraint is told about the step that it follows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Caps aim below w_max by this much, so that roundings cannot climb over it step by step. A weight
# stored in 16 bits is rounded by up to half a unit in the last place of each entry.
FLOAT32_MARGIN = 2e-6
STORAGE_MARGIN = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Settings of one application of a constraint to N stacked matrices, each in units of its cap.

    Attributes:
        largest: Bound on the norm of each matrix before the constraint; ``None`` is unknown.
        spectral_decay: Share of the largest singular value that ``spectral_weight_decay`` removes.
        power_iters: Rounds of power iteration.
        vectors: Right singular vectors (N, I, 1) of the previous step, updated in place.
        dtype: Arithmetic of matrix polynomials; singular vectors are always float32 at least.
        margin: Relative distance below the cap, left for roundings.
    """

    largest: tuple[float | None, ...]
    spectral_decay: float = 0.1
    power_iters: int = 16
    vectors: Tensor | None = None
    dtype: torch.dtype = torch.float32
    margin: float = FLOAT32_MARGIN


def storage_margin(dtype: torch.dtype) -> float:
    """Return the margin below a cap that storing a weight in ``dtype`` needs (dimensionless)."""
    return STORAGE_MARGIN.get(dtype, FLOAT32_MARGIN)


def per_matrix(values: list[float], like: Tensor) -> Any:
    """Return one number if all are equal, else a tensor (N, 1, 1) on the device of ``like``."""
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
