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
from solvers.bounds.kform import Factor, KForm, Term, minimise

# Shape letters: O output and I input width of the block, N neurons (multipliers).

_DEAD = 60.0  # log multiplier of a neuron without input or output: e^-60 is below all rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpSolution:
    """Multipliers of one block and what the solver knows about them.

    Attributes:
        theta: (N,) log multipliers, float64, one per column of B.
        primal: Bound at ``theta`` in float64, without rounding margin.
        dual: Lower bound of the best K-form bound; at most ``primal``.
        gap: ``primal - dual``.
        evals: Eigen-decompositions.
        seconds: Wall time.
        method: Solver name, or "mid" / "init" when its closed form was not improved on.
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
        max_evals: Budget of eigen-decompositions; 0 takes the best closed form.
        method: One of ``kform.METHODS``.
        theta0: (N,) warm start.

    Returns:
        The best of the closed forms "mid" (one scalar), "init" (column norms), the warm start
        and the solver's iterates, all expressed through ``theta``.

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
    size_b, size_g = (float(torch.linalg.matrix_norm(m, 2)) for m in (B, G))
    starts = {
        "mid": torch.full_like(norm_b, math.log(size_b / size_g)),
        "init": norm_b.log() - norm_g.log(),
    }
    if theta0 is not None:
        starts["warm"] = _warm_start(theta0, live)
    values = {name: form.value(start) for name, start in starts.items()}
    best = min(values, key=lambda name: values[name])
    first = starts["warm"] if "warm" in starts else starts["init"]
    solved = minimise(form, first, gap=tol * size_b * size_g, max_evals=max_evals, method=method)
    theta[live] = solved.theta
    name = method if solved.primal < values[best] else best
    return _solution(theta, solved.primal, solved.dual, solved.evals, began, name)


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
