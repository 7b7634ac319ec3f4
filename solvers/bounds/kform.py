"""Sums of largest eigenvalues whose matrices are posynomial in positive multipliers.

``value(theta) = sum_b weight_b lambda_max(K_b(theta))`` with
``K_b = constant_b + sum_i e^(theta_i) A_bi + e^(-theta_i) B_bi`` (A, B positive semidefinite) is
convex in ``theta``. Both block bounds are of this kind. Untrusted: any ``theta`` gives a sound
bound, and the checker evaluates it again. Source: spec bound_tightening 2.2 to 2.5, 6.3.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.config import one_of, positive
from solvers.bounds.spectrum import Dense, Engine, Halved, Krylov, Spectrum
from solvers.bounds.terms import Factor as Factor
from solvers.bounds.terms import Term as Term
from solvers.iterate import continuation, make_solver
from solvers.problem import Inclusion

# Shape letters: D dimension of a term, R rows of a factor, N multipliers.

METHODS = ("halpern", "halpern_reflected", "halpern_restarted", "halpern_anderson", "lbfgs")
MU_STAGES = (64.0, 16.0, 4.0, 1.0)
WARM_STAGES = (16.0, 4.0, 1.0)  # from a start that is nearly optimal
_RANGE = 20.0  # largest change of a log multiplier
_UNIT_FLOOR = 0.3  # of the mean curvature, kept in the units of the multipliers
_DROP = 1e-9  # softmax weights below this are left out
_AIM = 0.98  # of the gap, where primal values are estimates
HALVED_DIM = 64  # of terms decomposed at half their size
KRYLOV_DIM = 2048  # of terms too large to decompose


@dataclass(frozen=True, kw_only=True, slots=True)
class KSolution:
    """Outcome of :func:`minimise`.

    Attributes:
        theta: (N,) log multipliers of the best primal value, float64.
        primal: Value at ``theta`` in float64 without rounding margin, never an estimate.
        dual: Lower bound of the optimal value.
        evals: Spectra of the whole sum.
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
        evals: Spectra of the whole sum so far.
        best: Smallest primal value seen, and ``best_theta`` where; an estimate from below until
            :meth:`settle`, unless every term is decomposed in full.
        dual: Largest dual value seen.
    """

    def __init__(self, terms: tuple[Term, ...], num_multipliers: int) -> None:
        self.terms = terms
        self.num_multipliers = num_multipliers
        self.evals = 0
        self.best = math.inf
        self.best_theta = torch.zeros(num_multipliers, dtype=torch.float64)
        self.dual = -math.inf
        self._coupled = [term.is_coupled for term in terms]
        self._engines = [choose_engine(term) for term in terms]
        self._seen: tuple[Tensor, float, list[Spectrum]] | None = None

    @property
    def log_dim(self) -> float:
        """Smoothing error of the objective per unit of ``mu``."""
        return sum(term.weight * math.log(max(2, term.dim)) for term in self.terms)

    @property
    def slack(self) -> float:
        """Share of a wanted gap to aim at, so that the exact value meets it as well."""
        return 1.0 if all(engine.is_exact for engine in self._engines) else _AIM

    def matrix(self, term: Term, theta_N: Tensor) -> Tensor:
        """Return the symmetric matrix (D, D) of one term."""
        return term.matrix(theta_N)

    def value(self, theta_N: Tensor) -> float:
        """Return the primal value at ``theta``, exact to rounding (eigenvalues alone)."""
        primal = 0.0
        for engine in self._engines:
            primal += engine.term.weight * engine.top(theta_N)
        self._record(theta_N, primal)
        return primal

    def settle(self) -> None:
        """Replace the estimate of the best primal value by the exact value there."""
        if all(engine.is_exact for engine in self._engines):
            return
        theta_N, self.best = self.best_theta, math.inf
        self.value(theta_N)

    def refine(self) -> bool:
        """Make the estimates more accurate; false when they already are as good as they get."""
        self._seen = None
        return sum(engine.refine() for engine in self._engines) > 0

    def spectra(self, theta_N: Tensor, mu: float) -> list[Spectrum]:
        """Return the top of every term's spectrum, as much of it as ``mu`` asks for."""
        if self._seen is not None:
            old_N, old_mu, spectra = self._seen
            serves = all(engine.serves(old_mu, mu) for engine in self._engines)
            if serves and torch.equal(theta_N, old_N):
                return spectra
        spectra = [engine(theta_N, mu) for engine in self._engines]
        self._seen = theta_N.clone(), mu, spectra
        self.evals += 1
        tops = [float(spectrum.values_R[-1]) for spectrum in spectra]
        primal = sum(term.weight * top for term, top in zip(self.terms, tops, strict=True))
        self._record(theta_N, primal)
        return spectra

    def moments(self, theta_N: Tensor, mu: float) -> tuple[Tensor, Tensor]:
        """Return ``(p, q)``, each (N,): mean weights of ``A_i`` and ``B_i`` under the softmax.

        Updates the primal and the dual bound on the way.
        """
        total_2N, balanced_2N = (
            theta_N.new_zeros(2, len(theta_N)),
            theta_N.new_zeros(2, len(theta_N)),
        )
        constants = torch.zeros(2, dtype=torch.float64)
        spectra = self.spectra(theta_N, mu)
        for term, is_coupled, (values, vectors) in zip(
            self.terms, self._coupled, spectra, strict=True
        ):
            weights = torch.softmax(values / mu, 0)
            keep = weights > _DROP
            weights = weights[keep] / weights[keep].sum()
            vectors_KD = vectors[:, keep].mT.contiguous()
            part_2N = torch.zeros_like(total_2N)
            for rows_RD, group_R, sign, offset in term.factors:
                seen_KR = vectors_KD[:, offset : offset + rows_RD.shape[1]] @ rows_RD.mT
                part_2N[int(sign < 0)].index_add_(0, group_R, weights @ seen_KR.square())
            constant, scale_x, scale_y = 0.0, 1.0, 1.0
            if is_coupled:
                scale_x, scale_y = _balance(term, vectors_KD, weights)
            if term.constant_DD is not None:
                product_KD = vectors_KD * (vectors_KD @ term.constant_DD)
                constant = float(weights @ product_KD.sum(1))
            total_2N += term.weight * part_2N
            balanced_2N += term.weight * part_2N * part_2N.new_tensor([[scale_x], [scale_y]])
            constants[0] += term.weight * constant
            constants[1] += term.weight * constant * math.sqrt(scale_x * scale_y)
        for constant, (p_N, q_N) in zip(constants, (total_2N, balanced_2N), strict=True):
            self.dual = max(self.dual, float(constant + 2 * (p_N * q_N).sqrt().sum()))
        return total_2N[0], total_2N[1]

    def _record(self, theta_N: Tensor, primal: float) -> None:
        if primal < self.best:
            self.best, self.best_theta = primal, theta_N.clone()

    def gradient(self, theta_N: Tensor, mu: float) -> Tensor:
        """Return the gradient (N,) of the smoothed objective."""
        p_N, q_N = self.moments(theta_N, mu)
        return theta_N.exp() * p_N - (-theta_N).exp() * q_N

    def unit(self, theta_N: Tensor, mu: float) -> Tensor:
        """Return a unit (N,) of every log multiplier, in which the curvatures are alike."""
        p_N, q_N = self.moments(theta_N, mu)
        curvature_N = theta_N.exp() * p_N + (-theta_N).exp() * q_N
        floor = _UNIT_FLOOR * float(curvature_N.mean())
        return (curvature_N + floor).rsqrt() if floor > 0 else torch.ones_like(theta_N)

    def problem(self, start_N: Tensor, mu: float, centre_N: Tensor, unit_N: Tensor) -> Inclusion:
        """Return the inclusion ``0 = gradient(theta)`` in the variable ``theta / unit``."""
        theta_N = start_N * unit_N
        p_N, q_N = self.moments(theta_N, mu)
        curvature_N = (theta_N.exp() * p_N + (-theta_N).exp() * q_N) * unit_N.square()

        def operator(point_N: Tensor) -> Tensor:
            # Outside the box the methods are told "not finite", which shortens their step.
            theta_N = point_N * unit_N
            if not bool(((theta_N - centre_N).abs() <= _RANGE).all()):
                return torch.full_like(point_N, torch.nan)
            return self.gradient(theta_N, mu) * unit_N

        return Inclusion(
            operator=operator,
            start=start_N,
            lipschitz_est=4 * float(curvature_N.max()) or 1.0,
            cocoercive=True,
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
        max_evals: Limit of spectra (a line search may pass it by a few).
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
        return form.best - form.dual <= form.slack * gap or form.evals >= max_evals

    unit_N = form.unit(theta0_N, mu_stages[0] * mu)
    stages = [
        lambda start_N, scale=scale: form.problem(start_N, scale * mu, theta0_N, unit_N)
        for scale in mu_stages
    ]
    start_N = theta0_N
    while not done():
        continuation(stages, make_solver(method), start_N / unit_N, callback=done)
        form.settle()
        if form.best - form.dual <= gap or done() or not form.refine():
            break
        start_N = form.best_theta
    form.settle()
    return KSolution(
        theta=form.best_theta,
        primal=form.best,
        dual=form.dual,
        evals=form.evals,
        seconds=time.perf_counter() - began,
    )


def choose_engine(term: Term) -> Engine:
    """Return the cheapest way to see the top of a term's spectrum."""
    if term.dim >= KRYLOV_DIM:
        return Krylov(term)
    if term.dim >= HALVED_DIM and term.is_coupled and 2 * term.split == term.dim:
        return Halved(term)
    return Dense(term)


def _balance(term: Term, vectors_KD: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return factors that give both blocks of ``Z`` the trace 1/2: a free rescaling."""
    traces = weights @ vectors_KD.square()
    trace_x, trace_y = (float(part.sum()) for part in traces.tensor_split([term.split]))
    return 0.5 / max(trace_x, 1e-300), 0.5 / max(trace_y, 1e-300)
