"""Multipliers for the K-form bound of an MLP block: ``|C + B S G|`` over ``|S_ii| <= 1``.

Finds log multipliers ``theta`` that make ``lambda_max [[G^T L G, C^T], [C, B L^-1 B^T]]``,
``L = diag(e^theta)``, small; every ``theta`` gives a sound bound. Untrusted: the checker
evaluates the bound again. Source: spec bound_tightening 2 and 6.3.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import positive
from common.errors import ConfigError, ShapeError
from solvers.bounds.kform import MU_STAGES, WARM_STAGES, Factor, KForm, Term, minimise
from solvers.bounds.spectrum import random_block, top_ritz

# Shape letters: O output and I input width of the block, N neurons (multipliers).

_SMALL = 64  # width below which a norm is cheapest by singular values
_NORM_RESIDUAL = 1e-3  # its square, over the spectral gap, is the error of the estimate
_DEAD = 60.0  # log multiplier of a neuron without input or output: e^-60 is below all rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSolution:
    """Multipliers of one block and what the solver knows about them.

    Attributes:
        theta: (N,) log multipliers, float64, one per column of B.
        primal: Bound at ``theta`` in float64, without rounding margin.
        dual: Lower bound of the best K-form bound; at most ``primal``.
        gap: ``primal - dual``.
        evals: Spectra.
        seconds: Wall time.
        method: Solver name, or "warm" / "init" / "mid" when that start was not improved on.
    """

    theta: Tensor
    primal: float
    dual: float
    gap: float
    evals: int
    seconds: float
    method: str


def tighten_mlp(
    C: Tensor,
    B: Tensor,
    G: Tensor,
    *,
    tol: float = 0.01,
    max_evals: int = 200,
    method: str = "halpern_anderson",
    theta0: Tensor | None = None,
) -> MlpSolution:
    """Minimise the K-form bound of ``C + B S G`` over the multipliers.

    Args:
        C: (O, I) constant part.
        B: (O, N) output side.
        G: (N, I) input side.
        tol: Wanted duality gap relative to ``|B| |G|``, > 0.
        max_evals: Budget of spectra; 0 takes the best closed form.
        method: One of ``kform.METHODS``.
        theta0: (N,) warm start.

    Returns:
        The best of the solver's iterates, which begin with the warm start or "init" (column
        norms); where they miss the gap, the closed forms "mid" (one scalar) and "init" compete.

    Raises:
        ShapeError: for matrices that do not fit together.
        ConfigError: for entries that are not finite, or impossible settings.

    Source:
        Spec bound_tightening 2.2 to 2.6 and 6.3; dead neurons are deleted before solving.
    """
    began = time.perf_counter()
    C, B, G = _checked(C, B, G)
    positive("tol", tol)
    norm_b, norm_g = B.norm(dim=0), G.norm(dim=1)
    live = (norm_b > 0) & (norm_g > 0)
    theta = _DEAD * ((norm_g == 0).double() - (norm_b == 0).double())
    if not bool(live.any()):
        top = float(torch.linalg.matrix_norm(C, 2))
        return _solution(theta, top, top, 0, began, "dead")
    B, G, norm_b, norm_g = B[:, live], G[live], norm_b[live], norm_g[live]
    form = mlp_objective(C, B, G)
    size_b, size_g = norm_est(B), norm_est(G)
    start = "init" if theta0 is None else "warm"
    first = norm_b.log() - norm_g.log() if theta0 is None else _warm_start(theta0, live)
    gap = tol * size_b * size_g
    stages = MU_STAGES if theta0 is None else WARM_STAGES
    solved = minimise(form, first, gap=gap, max_evals=max_evals, method=method, mu_stages=stages)
    best, primal = solved.theta, solved.primal
    name = start if torch.equal(best, first) else method
    if primal - solved.dual > gap:
        # Only then can a closed form be better by more than the gap.
        closed = {"mid": torch.full_like(norm_b, math.log(size_b / size_g))}
        closed |= {"init": norm_b.log() - norm_g.log()} if start == "warm" else {}
        for closed_name, point in closed.items():
            if (value := form.value(point)) < primal:
                best, primal, name = point, value, closed_name
    theta[live] = best
    return _solution(theta, primal, solved.dual, solved.evals, began, name)


def norm_est(matrix: Tensor) -> float:
    """Return the spectral norm of a float64 matrix from below, about 1e-6 accurate, from products.

    An estimate: it scales the wanted gap and places the first multipliers, nothing else.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.mT
    dim = matrix.shape[1]
    if dim <= _SMALL:
        return float(torch.linalg.matrix_norm(matrix, 2))

    def enough(values_R: Tensor) -> Tensor:
        # Only the top value is wanted; the others may stay as they are.
        wanted_R = torch.full_like(values_R, math.inf)
        wanted_R[-1] = _NORM_RESIDUAL * values_R[-1]
        return wanted_R

    start = random_block(dim, 4, matrix)
    found = top_ritz(lambda block: matrix.mT @ (matrix @ block), start, enough)
    return math.sqrt(float(found.values_R[-1]))


def mlp_objective(C: Tensor, B: Tensor, G: Tensor) -> KForm:
    """Return the K-form of float64 matrices as an objective in the log multipliers (N,)."""
    width_O, width_I = C.shape
    constant = C.new_zeros(width_I + width_O, width_I + width_O)
    constant[width_I:, :width_I] = C
    constant[:width_I, width_I:] = C.mT
    index_N = torch.arange(G.shape[0])
    factors = (
        Factor(rows_RD=G.contiguous(), group_R=index_N, sign=1, offset=0),
        Factor(rows_RD=B.mT.contiguous(), group_R=index_N, sign=-1, offset=width_I),
    )
    term = Term(dim=width_I + width_O, weight=1.0, constant_DD=constant, factors=factors)
    return KForm((term,), G.shape[0])


def _solution(
    theta: Tensor, primal: float, dual: float, evals: int, began: float, method: str
) -> MlpSolution:
    seconds = time.perf_counter() - began
    return MlpSolution(
        theta=theta,
        primal=primal,
        dual=min(dual, primal),
        gap=max(0.0, primal - dual),
        evals=evals,
        seconds=seconds,
        method=method,
    )


def _checked(C: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shapes = tuple(tuple(matrix.shape) for matrix in (C, B, G))
    fits = all(matrix.ndim == 2 for matrix in (C, B, G)) and (
        B.shape[0] == C.shape[0] and G.shape[1] == C.shape[1] and B.shape[1] == G.shape[0]
    )
    if not fits:
        raise ShapeError(f"C, B, G: expected (O, I), (O, N), (N, I), got {shapes}")
    for name, matrix in (("C", C), ("B", B), ("G", G)):
        if not bool(torch.isfinite(matrix).all()):
            raise ConfigError(f"{name}: expected finite entries; the weights hold NaN or infinity")
    return C.detach().double().cpu(), B.detach().double().cpu(), G.detach().double().cpu()


def _warm_start(theta0: Tensor, live: Tensor) -> Tensor:
    if theta0.shape != live.shape:
        raise ShapeError(
            f"theta0: expected {tuple(live.shape)}, got {tuple(theta0.shape)}; one per neuron"
        )
    if not bool(torch.isfinite(theta0).all()):
        raise ConfigError("theta0: expected finite log multipliers")
    return theta0.detach().double().cpu()[live]
