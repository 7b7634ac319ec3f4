"""New weights for the kept components, from leaving them alone to least squares under a cap.

All minimise the same ridged error over ever larger sets: ``scalar`` one factor per component,
``delta`` one per component and output, ``lsq`` every weight. Unconstrained least squares destroys
a Lipschitz certificate; the cap of ``lsq_capped`` keeps it. Sources: arXiv 2511.19566 (delta);
the ridge toward the original weights and the cap are our own.
"""

# Legend: I inputs, O outputs, K kept inputs, C kept components, U inputs per component.

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from common.config import one_of
from compress.elimination import regular_cholesky
from compress.scores import similarity
from compress.targets import Problem

MAX_STEPS = 300
CHECK_EVERY = 5
"""Steps between stopping tests of the projected gradient."""
GAIN_TOLERANCE = 1e-4
"""Stop when that many steps lower the total error by less than this fraction."""

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
    if len(kept_K) == len(problem.weight_IO):
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
    """Least squares over the ball of matrices with spectral norm at most ``cap``.

    Accelerated projected gradient with restarts, started from the clipped free solution.
    """
    free_KO = _least_squares(problem, kept_K, cap)
    start_KO = clip_spectrum(free_KO, cap)
    gram_KK = problem.gram_II[kept_K][:, kept_K]
    # Without any activation all weights fit alike.
    if start_KO is free_KO or not bool(gram_KK.any()):
        return start_KO
    target_KO = gram_KK @ free_KO
    step = 1 / float(torch.linalg.eigvalsh(gram_KK)[-1])
    point = previous = start_KO
    ahead, momentum = point, 1.0
    best = reconstruction_error(problem, kept_K, point)
    for count in range(1, MAX_STEPS + 1):
        gradient = gram_KK @ ahead - target_KO
        point = clip_spectrum(ahead - step * gradient, cap)
        moved = point - previous
        if float((gradient * moved).sum()) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        ahead = point + (momentum - 1) / following * moved
        momentum, previous = following, point
        if count % CHECK_EVERY == 0:
            error = reconstruction_error(problem, kept_K, point)
            if error > (1 - GAIN_TOLERANCE) * best:
                break
            best = error
    return point


METHODS: dict[str, Compensator] = {
    "none": _keep,
    "scalar": _scalar,
    "delta": _delta,
    "lsq": _least_squares,
    "lsq_capped": _capped,
}
