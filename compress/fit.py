"""One place: which components stay and which weights they get."""

# Legend: I inputs of the pruned map, O its outputs, K kept inputs.

import dataclasses
from typing import Any

import torch
from torch import Tensor

from compress.adapters import Adapter
from compress.compensate import compensate, reconstruction_error
from compress.scoring.fidelity import Ranking, rank
from compress.settings import CompressConfig
from compress.statistics.grams import Moments
from compress.targets import Problem, Target, block_indices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """What was decided for one target.

    Attributes:
        target: The pruned place.
        kept_K: Kept inputs, ascending.
        weight_IO: New weights at full size (float64 values of the stored type); rows of removed
            inputs are zero.
        bias_O: New bias of the map, or None to keep the old one.
        error: Relative mean squared error on the calibration inputs, ``1 - fidelity``; at most
            this where ``hold`` made the weights smaller.
        held_error: The same on held-out calibration inputs.
        rows: Calibration rows that it was fitted on.
    """

    target: Target
    kept_K: Tensor
    weight_IO: Tensor
    bias_O: Tensor | None
    error: float
    held_error: float
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return what a record of the pruning says about this place."""
        target = self.target
        return {
            "name": target.name,
            "layer": target.layer,
            "kind": target.kind,
            "unit": target.unit,
            "components": target.components,
            "kept_components": len(self.kept_K) // target.unit,
            "dense_width": target.inputs,
            "width": len(self.kept_K),
            "kept": self.kept_K.tolist(),
            "error": self.error,
            "held_error": self.held_error,
        }


def fit_target(
    adapter: Adapter,
    target: Target,
    fitted: Moments,
    held: Moments,
    count: int,
    settings: CompressConfig,
    *,
    ranking: Ranking | None = None,
) -> Fit:
    """Choose the components of one target and compute their new weights.

    Args:
        adapter: The model with the target still dense.
        target: The place.
        fitted: Statistics to fit on.
        held: Statistics that only measure the error.
        count: Components to keep.
        settings: Score, compensation, cap.
        ranking: Order of removal, if already known.
    """
    problem = make_problem(adapter, target, fitted, settings)
    if ranking is None:
        ranking = rank(problem, settings.score, keep=count, seed=settings.seed)
    chosen = ranking.kept(count).to(problem.weight_IO.device)
    kept_K = block_indices(chosen, target.unit)
    weight_IO = torch.zeros_like(problem.weight_IO)
    weight_IO[kept_K] = _weights(adapter, target, problem, kept_K, settings)
    bias_O = adapter.bias(target) if settings.bias and len(kept_K) < target.inputs else None
    if bias_O is not None:
        bias_O = bias_O + (problem.weight_IO - weight_IO).T @ fitted.mean_I
    return Fit(
        target=target,
        kept_K=kept_K,
        weight_IO=weight_IO,
        bias_O=bias_O,
        error=_relative_error(problem, kept_K, weight_IO),
        held_error=_relative_error(
            make_problem(adapter, target, held, settings), kept_K, weight_IO
        ),
        rows=fitted.count,
    )


def make_problem(
    adapter: Adapter, target: Target, moments: Moments, settings: CompressConfig
) -> Problem:
    """Return the reconstruction problem of one target; centred where means cannot matter."""
    moves_bias = settings.bias and adapter.bias(target) is not None
    is_centred = moves_bias or adapter.absorbs_mean(target)
    return Problem(
        gram_II=moments.gram_II(centred=is_centred),
        weight_IO=adapter.weight(target),
        unit=target.unit,
        ridge=settings.ridge_for(moments.count, target.inputs),
        mean_I=None if is_centred else moments.mean_I,
    )


def _weights(
    adapter: Adapter, target: Target, problem: Problem, kept_K: Tensor, settings: CompressConfig
) -> Tensor:
    """Return the new weights (K, O), rounded to the stored type."""
    comp = settings.comp_for(certifiable=adapter.certifiable)
    cap = float("inf")
    if comp == "lsq_capped":
        cap = adapter.cap(target, kept_K, settings.tau)
    weight_KO = compensate(problem, kept_K, comp, cap=cap)
    if comp == "lsq_capped" and len(kept_K) < target.inputs:
        weight_KO = adapter.bounded(target, kept_K, weight_KO, settings.tau)
    return weight_KO.to(adapter.module(target).weight.dtype).double()


def _relative_error(problem: Problem, kept_K: Tensor, weight_IO: Tensor) -> float:
    energy = problem.energy
    error = reconstruction_error(problem, kept_K, weight_IO[kept_K])
    return error / energy if energy > 0 else 0.0
