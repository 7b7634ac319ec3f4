"""New weights for the kept components, from leaving them alone to least squares under a cap.

All minimise the same ridged error over ever larger sets: ``scalar`` one factor per component,
``delta`` one per component and output, ``lsq`` every weight. Unconstrained least squares destroys
a Lipschitz certificate; the cap of ``lsq_capped`` keeps it. Sources: arXiv 2511.19566 (delta);
the ridge toward the original weights and the cap are our own.
"""

# Legend: I inputs, O outputs, K kept inputs, C kept components, U inputs per component.

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from common.config import one_of
from compress.scoring.elimination import regular_cholesky
from compress.scoring.scores import similarity
from compress.targets import Problem

log = logging.getLogger(__name__)

MAX_STEPS = 200
CHECK_EVERY = 10
"""Steps between stopping tests of the capped fit."""
GAP_TOLERANCE = 1e-3
"""Proven relative excess over the smallest error under the cap at which it stops."""
RELAXATION = 1.6

Compensator = Callable[[Problem, Tensor, float], Tensor]


def compensate(
    problem: Problem, kept_K: Tensor, method: str = "lsq_capped", *, cap: float = float("inf")
) -> Tensor:
    """Return the weights of the kept inputs.

    Args:
        problem: Gram and weight, float64.
        kept_K: Kept input indices, ascending.
        method: Name in ``METHODS``.
        cap: Largest spectral norm of the result, for ``lsq_capped``.

    Returns:
        Weights (K, O), float64; the original ones exactly when nothing is removed.

    Raises:
        ConfigError: for an unknown method.
    """
    one_of("compress.comp", method, METHODS)
    if len(kept_K) in (0, len(problem.weight_IO)):
        return problem.weight_IO[kept_K]
    return METHODS[method](problem, kept_K, cap)


def reconstruction_error(problem: Problem, kept_K: Tensor, weight_KO: Tensor) -> float:
    """Return the mean squared output error (l2 over outputs) of weights on the kept inputs."""
    return float(output_errors(problem, kept_K, weight_KO).sum())


def output_errors(problem: Problem, kept_K: Tensor, weight_KO: Tensor) -> Tensor:
    """Return the mean squared error of each output for weights on the kept inputs (O)."""
    change_IO = problem.weight_IO.clone()
    change_IO[kept_K] -= weight_KO
    return (change_IO * (problem.gram_II @ change_IO)).sum(0).clamp(min=0)


def clip_spectrum(weight_KO: Tensor, cap: float) -> Tensor:
    """Return the nearest matrix (Frobenius) whose singular values are at most ``cap``.

    Works on the smaller Gram matrix: the singular values that matter are the largest ones,
    which it holds to full precision.
    """
    tall = weight_KO.shape[0] >= weight_KO.shape[1]
    gram = weight_KO.T @ weight_KO if tall else weight_KO @ weight_KO.T
    # The trace bounds the top eigenvalue, the row sums do too: often no decomposition is needed.
    if min(float(gram.trace()), float(gram.abs().sum(1).max())) <= cap * cap:
        return weight_KO
    values, vectors = torch.linalg.eigh(gram)
    above = values > cap * cap
    if not bool(above.any()):
        return weight_KO
    directions = vectors[:, above]
    shrink = 1 - cap / values[above].sqrt()
    if tall:
        return weight_KO - (weight_KO @ directions * shrink) @ directions.T
    return weight_KO - (directions * shrink) @ (directions.T @ weight_KO)


def _keep(problem: Problem, kept_K: Tensor, cap: float) -> Tensor:
    return problem.weight_IO[kept_K]


def _scalar(problem: Problem, kept_K: Tensor, cap: float) -> Tensor:
    """One factor per component, shared by all outputs."""
    kept_C = kept_K[:: problem.unit] // problem.unit
    factors_C = _factors(similarity(_with_ridge(problem)), kept_C)
    return problem.weight_IO[kept_K] * factors_C.repeat_interleave(problem.unit)[:, None]


def _delta(problem: Problem, kept_K: Tensor, cap: float) -> Tensor:
    """One factor per component and output: the compensation of the paper.

    For components of one input it is least squares where no weight is 0, at its price; else one
    system per output.
    """
    new_KO = problem.weight_IO[kept_K]
    if problem.unit == 1 and bool((new_KO != 0).all()):
        return _least_squares(problem, kept_K, cap)
    ridged = _with_ridge(problem)
    kept_C = kept_K[:: problem.unit] // problem.unit
    for output in range(new_KO.shape[1]):
        weight_I1 = problem.weight_IO[:, output : output + 1]
        single = dataclasses.replace(ridged, weight_IO=weight_I1)
        factors_C = _factors(similarity(single), kept_C)
        new_KO[:, output] *= factors_C.repeat_interleave(problem.unit)
    return new_KO


def _factors(similarity_NN: Tensor, kept_C: Tensor) -> Tensor:
    """Return the factors of the kept components that rebuild the sum of all; 1 where it is moot."""
    gone = torch.ones(len(similarity_NN), dtype=torch.bool, device=kept_C.device)
    gone[kept_C] = False
    own_CC = similarity_NN[kept_C][:, kept_C]
    # A component without weights or activation is a row of zeros: any factor does.
    own_CC.diagonal()[own_CC.diagonal() == 0] = 1
    missing_C = similarity_NN[kept_C][:, gone].sum(1)
    return 1 + torch.cholesky_solve(missing_C[:, None], regular_cholesky(own_CC, 0.0))[:, 0]


def _with_ridge(problem: Problem) -> Problem:
    """Return the problem with its ridge inside the Gram: all factors are then penalised alike."""
    gram_II = problem.gram_II.clone()
    gram_II.diagonal().add_(problem.penalty)
    return dataclasses.replace(problem, gram_II=gram_II)


def _least_squares(problem: Problem, kept_K: Tensor, cap: float) -> Tensor:
    """Ridge toward the original weights: a large ridge means no change, duplicates still merge."""
    removed = torch.ones(len(problem.weight_IO), dtype=torch.bool, device=kept_K.device)
    removed[kept_K] = False
    gram_KK = problem.gram_II[kept_K][:, kept_K]
    missing_KO = problem.gram_II[kept_K][:, removed] @ problem.weight_IO[removed]
    factor_KK = regular_cholesky(gram_KK, problem.penalty)
    return problem.weight_IO[kept_K] + torch.cholesky_solve(missing_KO, factor_KK)


def _capped(problem: Problem, kept_K: Tensor, cap: float) -> Tensor:
    """Least squares over the ball of matrices with spectral norm at most ``cap``."""
    free_KO = _least_squares(problem, kept_K, cap)
    clipped_KO = clip_spectrum(free_KO, cap)
    gram_KK = problem.gram_II[kept_K][:, kept_K]
    # Without any activation all weights fit alike.
    if clipped_KO is free_KO or not bool(gram_KK.any()):
        return clipped_KO
    values_K, basis_KK = torch.linalg.eigh(gram_KK)
    floor = reconstruction_error(problem, kept_K, free_KO)
    inside_KO = _fit_in_ball(
        values_K.clamp(min=0)[:, None], basis_KK.T @ free_KO, basis_KK.T @ clipped_KO, cap, floor
    )
    return basis_KK @ inside_KO


def _fit_in_ball(
    values_K1: Tensor, free_KO: Tensor, start_KO: Tensor, cap: float, floor: float
) -> Tensor:
    """Return ``V`` with norm at most ``cap`` and the least ``sum values (V - free)^2``.

    Over-relaxed alternating directions: in the eigenbasis of the Gram the fit is a division, the
    ball a clipped spectrum. Stops when a linear lower bound on the error (Frank-Wolfe gap)
    proves that no more than a thousandth of ``floor`` plus error can be gained.
    """
    weight = float(values_K1.mean())
    point_KO, excess_KO = start_KO, torch.zeros_like(start_KO)
    for count in range(1, MAX_STEPS + 1):
        fitted_KO = values_K1 * free_KO + weight * (point_KO - excess_KO)
        fitted_KO /= values_K1 + weight
        ahead_KO = RELAXATION * fitted_KO + (1 - RELAXATION) * point_KO + excess_KO
        point_KO = clip_spectrum(ahead_KO, cap)
        excess_KO = ahead_KO - point_KO
        if count % CHECK_EVERY == 0:
            slope_KO = values_K1 * (point_KO - free_KO)
            error = float((slope_KO * (point_KO - free_KO)).sum())
            gap = 2 * (float((slope_KO * point_KO).sum()) + cap * _nuclear_norm(slope_KO))
            if gap <= GAP_TOLERANCE * (floor + error):
                break
    else:
        share = gap / (floor + error)
        log.debug("capped fit: at most %.1e above the least error, relative", share)
    return point_KO


def _nuclear_norm(weight_KO: Tensor) -> float:
    tall = weight_KO.shape[0] >= weight_KO.shape[1]
    gram = weight_KO.T @ weight_KO if tall else weight_KO @ weight_KO.T
    return float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())


METHODS: dict[str, Compensator] = {
    "none": _keep,
    "scalar": _scalar,
    "delta": _delta,
    "lsq": _least_squares,
    "lsq_capped": _capped,
}
