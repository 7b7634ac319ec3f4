"""Sums of largest eigenvalues whose matrices are posynomial in positive multipliers.

``value(theta) = sum_b weight_b lambda_max(K_b(theta))`` with
``K_b = constant_b + sum_i e^(theta_i) A_bi + e^(-theta_i) B_bi`` (A, B positive semidefinite) is
convex in ``theta``. Both block bounds are of this kind. Untrusted: any ``theta`` gives a sound
bound, and the checker evaluates it again. Source: spec bound_tightening 2.2 to 2.5, 6.3.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.config import one_of, positive
from solvers.iterate import continuation, make_solver
from solvers.problem import Inclusion

# Shape letters: D dimension of a term, R rows of a factor, N multipliers.

METHODS = ("halpern", "halpern_reflected", "halpern_restarted", "halpern_anderson", "lbfgs")
MU_STAGES = (16.0, 4.0, 1.0)
_RANGE = 20.0  # largest change of a log multiplier
_DROP = 1e-14  # softmax weights below this are left out


class Factor(NamedTuple):
    """``rows^T diag(e^(sign theta_group)) rows`` placed at ``offset`` in the term's matrix."""

    rows_RD: Tensor
    group_R: Tensor
    sign: int
    offset: int = 0


class Term(NamedTuple):
    """One eigenvalue: its weight, the constant part (or None) and the factors."""

    dim: int
    weight: float
    constant_DD: Tensor | None
    factors: tuple[Factor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class KSolution:
    """Outcome of :func:`minimise`.

    Attributes:
        theta: (N,) log multipliers of the best primal value, float64.
        primal: Value at ``theta`` in float64 without rounding margin.
        dual: Lower bound of the optimal value.
        evals: Eigen-decompositions of the whole sum.
        seconds: Wall time.
    """

    theta: Tensor
    primal: float
    dual: float
    evals: int
    seconds: float


class KForm:
    """The objective with its gradient and dual bound; remembers the best of both.

    Attributes:
        evals: Eigen-decompositions so far.
        best: Smallest primal value seen, and ``best_theta`` where.
        dual: Largest dual value seen.
    """

    def __init__(self, terms: tuple[Term, ...], num_multipliers: int) -> None:
        self.terms = terms
        self.num_multipliers = num_multipliers
        self.evals = 0
        self.best = math.inf
        self.best_theta = torch.zeros(num_multipliers, dtype=torch.float64)
        self.dual = -math.inf
        self._theta: Tensor | None = None
        self._eigen: list[tuple[Tensor, Tensor]] = []

    @property
    def log_dim(self) -> float:
        """Smoothing error of the objective per unit of ``mu``."""
        return sum(term.weight * math.log(max(2, term.dim)) for term in self.terms)

    def matrix(self, term: Term, theta_N: Tensor) -> Tensor:
        """Return the symmetric matrix (D, D) of one term."""
        if term.constant_DD is None:
            k_DD = theta_N.new_zeros(term.dim, term.dim)
        else:
            k_DD = term.constant_DD.clone()
        for rows_RD, group_R, sign, offset in term.factors:
            scaled_RD = rows_RD * torch.exp(0.5 * sign * theta_N[group_R])[:, None]
            stop = offset + rows_RD.shape[1]
            k_DD[offset:stop, offset:stop] += scaled_RD.mT @ scaled_RD
        return k_DD

    def eigenvalues(self, theta_N: Tensor) -> tuple[float, ...]:
        """Return the largest eigenvalue of each term at ``theta``."""
        if self._theta is None or not torch.equal(theta_N, self._theta):
            self._eigen = [torch.linalg.eigh(self.matrix(t, theta_N)) for t in self.terms]
            self._theta = theta_N.clone()
            self.evals += 1
        return tuple(float(values[-1]) for values, _ in self._eigen)

    def value(self, theta_N: Tensor) -> float:
        """Return the primal value at ``theta`` (one eigen-decomposition per term)."""
        tops = self.eigenvalues(theta_N)
        primal = sum(term.weight * top for term, top in zip(self.terms, tops, strict=True))
        if primal < self.best:
            self.best, self.best_theta = primal, theta_N.clone()
        return primal

    def moments(self, theta_N: Tensor, mu: float) -> tuple[Tensor, Tensor]:
        """Return ``(p, q)``, each (N,): mean weights of ``A_i`` and ``B_i`` under the softmax.

        Updates the dual bound on the way.
        """
        self.value(theta_N)
        p_N, q_N, constant, divisor = torch.zeros_like(theta_N), torch.zeros_like(theta_N), 0.0, 1.0
        for term, (values, vectors) in zip(self.terms, self._eigen, strict=True):
            weights = torch.softmax(values / mu, 0)
            keep = weights > _DROP
            weights, vectors = weights[keep] / weights[keep].sum(), vectors[:, keep]
            for rows_RD, group_R, sign, offset in term.factors:
                seen = rows_RD @ vectors[offset : offset + rows_RD.shape[1]]
                (p_N if sign > 0 else q_N).index_add_(
                    0, group_R, term.weight * (seen.square() @ weights)
                )
            if term.constant_DD is not None:
                product = (vectors * (term.constant_DD @ vectors)).sum(0) @ weights
                constant += term.weight * float(product)
                divisor *= _balance(term, vectors, weights)
        dual = constant + 2 * float((p_N * q_N).sqrt().sum())
        self.dual = max(self.dual, dual / divisor if dual > 0 else dual)
        return p_N, q_N

    def gradient(self, theta_N: Tensor, mu: float) -> Tensor:
        """Return the gradient (N,) of the smoothed objective."""
        p_N, q_N = self.moments(theta_N, mu)
        return theta_N.exp() * p_N - (-theta_N).exp() * q_N

    def problem(self, theta_N: Tensor, mu: float, centre_N: Tensor) -> Inclusion:
        """Return the inclusion ``0 = gradient(theta)``, started at ``theta``."""
        p_N, q_N = self.moments(theta_N, mu)
        curvature = float((theta_N.exp() * p_N + (-theta_N).exp() * q_N).max())

        def operator(point_N: Tensor) -> Tensor:
            # Outside the box the methods are told "not finite", which shortens their step.
            if not bool(((point_N - centre_N).abs() <= _RANGE).all()):
                return torch.full_like(point_N, torch.nan)
            return self.gradient(point_N, mu)

        return Inclusion(
            operator=operator, start=theta_N, lipschitz_est=4 * curvature or 1.0, cocoercive=True
        )


def minimise(
    form: KForm,
    theta0_N: Tensor,
    *,
    gap: float,
    max_evals: int = 200,
    method: str = "halpern_anderson",
    mu_stages: tuple[float, ...] = MU_STAGES,
) -> KSolution:
    """Minimise a form by continuation in the smoothing until the duality gap is small enough.

    Args:
        form: The objective; its memory of best values is used and updated.
        theta0_N: First log multipliers, float64.
        gap: Wanted absolute distance between primal and dual, > 0.
        max_evals: Limit of eigen-decompositions (a line search may pass it by a few).
        method: One of ``METHODS``.
        mu_stages: Smoothings in units of the last one, decreasing.

    Returns:
        The best multipliers with primal and dual values.

    Raises:
        ConfigError: for an unknown method or impossible limits.
    """
    one_of("method", method, METHODS)
    positive("gap", gap)
    positive("max_evals", max_evals, zero=True)
    began = time.perf_counter()
    mu = gap / (2 * form.log_dim)

    def done(*_: Any) -> bool:
        return form.best - form.dual <= gap or form.evals >= max_evals

    form.moments(theta0_N, mu)
    if not done():
        stages = [
            lambda start_N, scale=scale: form.problem(start_N, scale * mu, theta0_N)
            for scale in mu_stages
        ]
        continuation(stages, make_solver(method), theta0_N, callback=done)
    return KSolution(
        theta=form.best_theta,
        primal=form.best,
        dual=form.dual,
        evals=form.evals,
        seconds=time.perf_counter() - began,
    )


def _balance(term: Term, vectors: Tensor, weights: Tensor) -> float:
    """Return ``2 sqrt(tr Z_xx tr Z_yy)``: rescaling the two blocks of Z to trace one is free."""
    split = max(factor.offset for factor in term.factors)
    trace_x = float(vectors[:split].square().sum(0) @ weights)
    return 2 * math.sqrt(max(trace_x * (1 - trace_x), 1e-300))
