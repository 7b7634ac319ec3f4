"""One layer: which components stay and which weights they get."""

# Legend: I inputs of the pruned map, O its outputs, K kept inputs.

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from common.norms import spectral_norm
from compress.compensate import compensate, reconstruction_error
from compress.fidelity import Ranking, rank
from compress.grams import Moments
from compress.settings import CompressConfig
from compress.targets import Problem, Target, block_indices


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerFit:
    """What was decided for one layer.

    Attributes:
        target: The pruned place.
        kept_K: Kept inputs, ascending.
        down_OK: New down projection in the stored type.
        bias_O: New bias of the down projection, or None to keep the old one.
        error: Relative mean squared error on the calibration text, ``1 - fidelity``.
        held_error: The same on held-out calibration text.
    """

    target: Target
    kept_K: Tensor
    down_OK: Tensor
    bias_O: Tensor | None
    error: float
    held_error: float


def fit_layer(
    model: Any,
    target: Target,
    fitted: Moments,
    held: Moments,
    count: int,
    settings: CompressConfig,
    *,
    ranking: Ranking | None = None,
) -> LayerFit:
    """Choose the components of one layer and compute their new weights.

    Args:
        model: Dense transformer.
        target: The place.
        fitted: Statistics to fit on.
        held: Statistics that only measure the error.
        count: Components to keep.
        settings: Score, compensation, cap.
        ranking: Order of removal, if already known.
    """
    mlp = model.layers[target.layer].mlp
    problem = make_problem(model, target, fitted, settings)
    if ranking is None:
        ranking = rank(problem, settings.score, keep=count, seed=settings.seed)
    chosen = ranking.kept(count).to(problem.weight_IO.device)
    kept_K = block_indices(chosen, target.unit)
    stored = mlp.down.weight.dtype
    cap = norm_cap(mlp, kept_K, settings.tau)
    weight_KO = compensate(problem, kept_K, settings.comp, cap=cap).to(stored).double()
    held_problem = make_problem(model, target, held, settings)
    bias_O = None
    if settings.bias and len(kept_K) < target.inputs:
        change_IO = problem.weight_IO.clone()
        change_IO[kept_K] -= weight_KO
        bias_O = (mlp.down.bias.double() + change_IO.T @ fitted.mean_I).to(stored)
    return LayerFit(
        target=target,
        kept_K=kept_K,
        down_OK=weight_KO.T.to(stored),
        bias_O=bias_O,
        error=_relative_error(problem, kept_K, weight_KO),
        held_error=_relative_error(held_problem, kept_K, weight_KO),
    )


def make_problem(model: Any, target: Target, moments: Moments, settings: CompressConfig) -> Problem:
    """Return the reconstruction problem of one layer; centred where the bias may move."""
    down = model.layers[target.layer].mlp.down
    return Problem(
        gram_II=moments.gram_II(centred=settings.bias),
        weight_IO=down.weight.detach().double().T,
        unit=target.unit,
        ridge=settings.ridge_for(moments.count, target.inputs),
    )


def norm_cap(mlp: Any, kept_K: Tensor, tau: float) -> float:
    """Return the cap on the new down projection that keeps the product of both norms.

    Narrowing the up projection frees norm for the down projection. A little is withheld for
    rounding to the stored type.
    """
    narrow = spectral_norm(mlp.up.weight[kept_K])
    if math.isinf(tau) or narrow == 0:
        return math.inf
    product = spectral_norm(mlp.up.weight) * spectral_norm(mlp.down.weight)
    rank_bound = min(len(kept_K), mlp.down.out_features)
    rounding = torch.finfo(mlp.down.weight.dtype).eps / 2 * math.sqrt(rank_bound)
    return tau * product / narrow / (1 + rounding)


def _relative_error(problem: Problem, kept_K: Tensor, weight_KO: Tensor) -> float:
    energy = problem.energy
    return reconstruction_error(problem, kept_K, weight_KO) / energy if energy > 0 else 0.0
