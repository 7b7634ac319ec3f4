"""Edits of one linear map that make it forget: closed forms on second moments of two classes.

``zero`` and ``negate`` are the published ones: the inputs that alone explain most of an output on
the class to forget lose their weight to it. ``ridge`` is ours: least squares that keeps the outputs
on retained data and moves those on the class to forget to the mean retained output. Source:
arXiv 2511.19566, Section on class unlearning (ModHiFi-U); ``rowsum`` from its predecessor CoBRA;
``contrast``, ``neurons`` and ``ridge`` are our own.
"""

# Legend: I inputs of the map, O its outputs, N components.

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import one_of
from compress.compensate import METHODS
from compress.scoring.elimination import regular_cholesky
from compress.targets import Problem, block_indices

FLOOR = 1e-300
"""Added to denominators: an input or output that is always zero scores zero."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Classes:
    """What enters one linear map ``y = x W`` on both classes, in float64.

    Attributes:
        forget_II: Mean of ``x' x`` on the class to forget.
        forget_mean_I: Mean of ``x`` there.
        retain_II: Mean of ``x' x`` on retained data.
        retain_mean_I: Mean of ``x`` there.
        weight_IO: The map.
        unit: Neighbouring inputs per component.
    """

    forget_II: Tensor
    forget_mean_I: Tensor
    retain_II: Tensor
    retain_mean_I: Tensor
    weight_IO: Tensor
    unit: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Strength:
    """How much is edited.

    Attributes:
        share: Of the inputs per output (of the components for ``neurons``) that lose their weight.
        mu: Weight of the class to forget in ``ridge``, both classes counted per row.
        push: Where ``ridge`` moves the outputs of the class: 0 to the mean retained output, more
            beyond it, by this multiple of the way from the mean output of the class.
        ridge: Penalty on changes in ``ridge``, relative to the mean diagonal of the retained Gram.
        cap: Largest spectral norm of the result.
    """

    share: float = 0.2
    mu: float = 0.1
    push: float = 0.0
    ridge: float = 1e-6
    cap: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Edit:
    """New weights.

    Attributes:
        weight_IO: The new map.
        chosen_IO: The weights that carried the class; recovery leaves them alone. For ``ridge``,
            which chooses none, all of them.
    """

    weight_IO: Tensor
    chosen_IO: Tensor


Editor = Callable[[Classes, Strength], Edit]


def edit(classes: Classes, method: str, strength: Strength) -> Edit:
    """Return the map that has forgotten.

    Args:
        classes: Second moments and the map.
        method: Name in ``EDITS``.
        strength: How much, and the cap on the norm.

    Raises:
        ConfigError: for an unknown method, or activations that are not finite.
    """
    one_of("unlearn.method", method, EDITS)
    return EDITS[method](classes, strength)


def pair_scores(gram_II: Tensor, weight_IO: Tensor) -> Tensor:
    """Return the singleton fidelity of every (input, output) pair, (I, O), between 0 and 1.

    The share of the output's energy that the input explains alone, with the best factor.
    """
    projected_IO = gram_II @ weight_IO
    energy_O = (weight_IO * projected_IO).sum(0)
    # An input without weight contributes nothing, however correlated it is.
    scores_IO = projected_IO.square() / (gram_II.diagonal()[:, None] * energy_O + FLOOR)
    return scores_IO * (weight_IO != 0)


def row_sums(gram_II: Tensor, weight_IO: Tensor) -> Tensor:
    """Return ``E <y_o, x_i W_io>`` of every pair, (I, O): what it adds to the output's energy."""
    return weight_IO * (gram_II @ weight_IO)


def largest_per_output(scores_IO: Tensor, share: float) -> Tensor:
    """Return a mask (I, O) of the ``ceil(share I)`` largest scores of every output."""
    count = min(len(scores_IO), math.ceil(share * len(scores_IO) - 1e-9))
    chosen_IO = torch.zeros_like(scores_IO, dtype=torch.bool)
    return chosen_IO.scatter(0, scores_IO.topk(count, dim=0).indices, True)


def clip_by_scale(weight_IO: Tensor, cap: float) -> Tensor:
    """Scale a matrix down to spectral norm ``cap``, so that its zeros stay zeros."""
    if math.isinf(cap):
        return weight_IO
    norm = float(torch.linalg.matrix_norm(weight_IO, 2))
    return weight_IO if norm <= cap else weight_IO * (cap / norm)


def _zero(classes: Classes, strength: Strength) -> Edit:
    scores_IO = pair_scores(classes.forget_II, classes.weight_IO)
    return _without(classes, largest_per_output(scores_IO, strength.share), strength)


def _negate(classes: Classes, strength: Strength) -> Edit:
    scores_IO = pair_scores(classes.forget_II, classes.weight_IO)
    chosen_IO = largest_per_output(scores_IO, strength.share)
    weight_IO = torch.where(chosen_IO, -classes.weight_IO, classes.weight_IO)
    return Edit(weight_IO=clip_by_scale(weight_IO, strength.cap), chosen_IO=chosen_IO)


def _row_sum(classes: Classes, strength: Strength) -> Edit:
    scores_IO = row_sums(classes.forget_II, classes.weight_IO)
    return _without(classes, largest_per_output(scores_IO, strength.share), strength)


def _contrast(classes: Classes, strength: Strength) -> Edit:
    return _without(classes, largest_per_output(_contrasts(classes), strength.share), strength)


def _neurons(classes: Classes, strength: Strength) -> Edit:
    """Remove whole components: those with the largest mean contrast over inputs and outputs."""
    score_N = _contrasts(classes).mean(1).unflatten(0, (-1, classes.unit)).mean(1)
    chosen_N1 = largest_per_output(score_N[:, None], strength.share)
    rows = block_indices(chosen_N1[:, 0].nonzero().flatten(), classes.unit)
    chosen_IO = torch.zeros_like(classes.weight_IO, dtype=torch.bool)
    chosen_IO[rows] = True
    return _without(classes, chosen_IO, strength)


def _ridge(classes: Classes, strength: Strength) -> Edit:
    """Minimise ``E_r |X (V - W)|^2 + mu E_f |X V - t|^2 + lambda |V - W|^2``, ``|V| <= cap``.

    The published penalty would pull to zero; ours pulls to ``W``, which ``mu = 0`` returns exactly.
    """
    weight_IO, mu = classes.weight_IO, strength.mu
    chosen_IO = torch.ones_like(weight_IO, dtype=torch.bool)
    if mu == 0:
        return Edit(weight_IO=weight_IO, chosen_IO=chosen_IO)
    away_I = classes.retain_mean_I - classes.forget_mean_I
    goal_O = (classes.retain_mean_I + strength.push * away_I) @ weight_IO
    excess_IO = classes.forget_II @ weight_IO - torch.outer(classes.forget_mean_I, goal_O)
    total_II = classes.retain_II + mu * classes.forget_II
    penalty = strength.ridge * float(classes.retain_II.diagonal().mean())
    factor_II = regular_cholesky(total_II, penalty)
    free_IO = weight_IO - mu * torch.cholesky_solve(excess_IO, factor_II)
    problem = Problem(gram_II=total_II, weight_IO=free_IO, ridge=strength.ridge)
    every_I = torch.arange(len(weight_IO), device=weight_IO.device)
    # Around its minimum the objective is a quadratic form: the capped minimum is a projection.
    capped_IO = METHODS["lsq_capped"](problem, every_I, strength.cap)
    return Edit(weight_IO=capped_IO, chosen_IO=chosen_IO)


def _contrasts(classes: Classes) -> Tensor:
    forget_IO = pair_scores(classes.forget_II, classes.weight_IO)
    return forget_IO - pair_scores(classes.retain_II, classes.weight_IO)


def _without(classes: Classes, chosen_IO: Tensor, strength: Strength) -> Edit:
    weight_IO = classes.weight_IO.masked_fill(chosen_IO, 0.0)
    return Edit(weight_IO=clip_by_scale(weight_IO, strength.cap), chosen_IO=chosen_IO)


EDITS: dict[str, Editor] = {
    "ridge": _ridge,
    "zero": _zero,
    "negate": _negate,
    "rowsum": _row_sum,
    "contrast": _contrast,
    "neurons": _neurons,
}
