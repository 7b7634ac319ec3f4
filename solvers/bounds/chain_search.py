"""Multipliers for the bound of a chain of matrices: the interior-point method of its LMI.

Minimises ``p = rho^2`` over ``M(p, lambda) >= 0`` (see ``chain_proof``) by Newton's method on
``t p - log det M``. Every term of M is of rank two, so the Hessian is a handful of entrywise
squares. Untrusted: the checker tests what is found. Source: standard barrier method.
"""

# Shape letters: I input features, P multipliers, D = I + P, O output features.

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from common.norms import spectral_norm
from solvers.bounds.chain_proof import ChainForm, chain_form, multiplier_lengths

_GROWTH = 8.0  # factor on t between centrings
_CENTRED = 0.3  # Newton decrement at which t grows
_DEAD = 1e6  # multiplier of an entry that nothing reaches, in normalised units


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainSolution:
    """Multipliers of a chain and what the solver knows about them.

    Attributes:
        multipliers: One float64 vector per activation; empty where nothing was found.
        primal: l2 constant at these multipliers, without rounding margin.
        dual: Estimate of the smallest constant that multipliers can reach, from below.
        evals: Newton steps.
        seconds: Wall time.
    """

    multipliers: tuple[Tensor, ...]
    primal: float
    dual: float
    evals: int
    seconds: float


def tighten_chain(
    weights: list[Tensor], activation: str, *, tol: float = 0.01, max_evals: int = 200
) -> ChainSolution:
    """Search the multipliers that make the bound of a chain small.

    Args:
        weights: Float64 matrices, first to last, none of them zero.
        activation: ``relu``, ``tanh``, ``abs`` or ``maxmin``.
        tol: Wanted duality gap relative to the bound, > 0.
        max_evals: Limit of Newton steps; 0 takes the start, which proves the product of norms.

    Returns:
        The best feasible point; its bound is at most about the product of the norms.
    """
    began = time.perf_counter()
    norms = [spectral_norm(weight) for weight in weights]
    unit = [weight / norm for weight, norm in zip(weights, norms, strict=True)]
    lengths = multiplier_lengths(weights, activation)
    problem = _Chain(chain_form(unit, activation), lengths)
    p, lambda_P, dual, evals = problem.minimise(_start(lengths, activation), tol, max_evals)
    lambda_P = problem.whole(lambda_P)
    found, after = [], list(torch.tensor(norms, dtype=torch.float64).flip(0).cumprod(0).flip(0))
    for part_P, later in zip(lambda_P.split(lengths), after[1:], strict=True):
        # In the units of the true weights: times the square of what comes after the activation.
        found.append(part_P * later**2)
    product = math.prod(norms)
    return ChainSolution(
        multipliers=tuple(found),
        primal=math.sqrt(p) * product,
        dual=math.sqrt(dual) * product,
        evals=evals,
        seconds=time.perf_counter() - began,
    )


def _start(lengths: list[int], activation: str) -> Tensor:
    """Return multipliers that prove the product of norms when all norms are 1."""
    value = 1.0 if activation == "abs" else 0.5
    return torch.full((sum(lengths),), value, dtype=torch.float64)


class _Chain:
    """The barrier problem of a chain with unit norms, without the entries nothing reaches."""

    def __init__(self, form: ChainForm, lengths: list[int]) -> None:
        self.inputs, self.lengths = form.inputs, lengths
        self.live_P = form.n_PD.norm(dim=1) > 1e-12
        columns = torch.cat((torch.ones(form.inputs, dtype=torch.bool), self.live_P))
        self.n_PD = form.n_PD[self.live_P][:, columns]
        q_OD = form.q_OD[:, columns]
        self.fixed_DD = q_OD.T @ q_OD
        self.dim = self.fixed_DD.shape[0]

    def matrix(self, p: float, lambda_P: Tensor) -> Tensor:
        """Return ``M`` (D, D)."""
        ends_D = torch.cat((torch.full((self.inputs,), p, dtype=torch.float64), lambda_P))
        gram_DD = self.n_PD.T @ (lambda_P[:, None] * self.n_PD)
        return torch.diag(ends_D) - gram_DD - self.fixed_DD

    def whole(self, lambda_P: Tensor) -> Tensor:
        """Return multipliers of all entries, a large one where nothing arrives."""
        whole_P = torch.full((len(self.live_P),), _DEAD, dtype=torch.float64)
        whole_P[self.live_P] = lambda_P
        return whole_P

    def minimise(
        self, start_P: Tensor, tol: float, max_evals: int
    ) -> tuple[float, Tensor, float, int]:
        """Return ``p``, multipliers, an estimate of the best p from below, and Newton steps."""
        p, lambda_P = self._inside(start_P)
        t, dual, evals = self.dim / p, 0.0, 0
        while evals < max_evals:
            p, lambda_P, decrement = self._newton(p, lambda_P, t)
            evals += 1
            if decrement < _CENTRED:
                # A nearly centred point is within about dim / t of the best one.
                dual = max(dual, p - 2 * self.dim / t)
                # The relative gap of rho is half that of p = rho^2.
                if self.dim / t <= tol * p:
                    break
                t *= _GROWTH
        p = self._least(p, lambda_P)
        return p, lambda_P, min(dual, p), evals

    def _inside(self, start_P: Tensor) -> tuple[float, Tensor]:
        """Return a strictly feasible point near the product of norms."""
        for slack in (0.1, 0.5, 1.0, 3.0, 10.0):
            # Earlier layers need more, since they carry all that comes after them.
            depth = len(self.lengths)
            powers = [(1 + slack) ** (depth - k) for k in range(depth)]
            factor_P = torch.cat(
                [torch.full((n,), f) for n, f in zip(self.lengths, powers, strict=True)]
            )
            lambda_P = (start_P * factor_P)[self.live_P]
            p = (1 + slack) ** (depth + 1)
            if int(torch.linalg.cholesky_ex(self.matrix(p, lambda_P)).info) == 0:
                return p, lambda_P
        return p, lambda_P

    def _newton(self, p: float, lambda_P: Tensor, t: float) -> tuple[float, Tensor, float]:
        """Return the point after one step of the barrier problem, and the Newton decrement."""
        lower_DD, info = torch.linalg.cholesky_ex(self.matrix(p, lambda_P))
        if int(info):
            return p, lambda_P, 0.0
        v_DD = torch.cholesky_inverse(lower_DD)
        x, n_PD = self.inputs, self.n_PD
        vn_DP = v_DD @ n_PD.T
        mixed_PP = vn_DP[x:]
        both_PP = n_PD @ vn_DP
        gradient = torch.cat(
            (
                (t - v_DD.diagonal()[:x].sum())[None],
                both_PP.diagonal() - v_DD.diagonal()[x:],
            )
        )
        hessian = torch.empty(len(gradient), len(gradient), dtype=torch.float64)
        hessian[0, 0] = v_DD[:x, :x].square().sum()
        hessian[0, 1:] = v_DD[:x, x:].square().sum(0) - vn_DP[:x].square().sum(0)
        hessian[1:, 0] = hessian[0, 1:]
        hessian[1:, 1:] = v_DD[x:, x:].square() + both_PP.square()
        hessian[1:, 1:] -= mixed_PP.square() + mixed_PP.T.square()
        # Variables differ by orders of magnitude: solve in units of their own curvature.
        unit = hessian.diagonal().clamp(min=1e-300).rsqrt()
        scaled = unit[:, None] * hessian * unit
        scaled.diagonal().add_(1e-12)
        step = -unit * torch.linalg.solve(scaled, unit * gradient)
        decrement = math.sqrt(max(float(-(gradient @ step)), 0.0))
        length = self._length(lower_DD, step, t)
        return p + length * float(step[0]), lambda_P + length * step[1:], decrement

    def _length(self, lower_DD: Tensor, step: Tensor, t: float) -> float:
        """Return the step length that minimises the barrier along ``step``, exactly."""
        ends_D = torch.cat((step[:1].expand(self.inputs), step[1:]))
        change_DD = torch.diag(ends_D) - self.n_PD.T @ (step[1:, None] * self.n_PD)
        half_DD = torch.linalg.solve_triangular(lower_DD, change_DD, upper=False)
        white_DD = torch.linalg.solve_triangular(lower_DD, half_DD.mT, upper=False)
        rates_D = torch.linalg.eigvalsh((white_DD + white_DD.mT) / 2)
        least = float(rates_D[0])
        low, high = 0.0, min(4.0, -0.6 / least if least < 0 else 4.0)
        for _ in range(40):
            middle = (low + high) / 2
            slope = t * float(step[0]) - float((rates_D / (1 + middle * rates_D)).sum())
            low, high = (middle, high) if slope < 0 else (low, middle)
        return low

    def _least(self, p: float, lambda_P: Tensor) -> float:
        """Return the smallest p for these multipliers (a Schur complement's eigenvalue)."""
        x = self.inputs
        m_DD = self.matrix(0.0, lambda_P)
        lower_PP, info = torch.linalg.cholesky_ex(m_DD[x:, x:])
        if int(info):
            return p
        half_PI = torch.linalg.solve_triangular(lower_PP, m_DD[x:, :x], upper=False)
        schur_II = half_PI.T @ half_PI - m_DD[:x, :x]
        return min(p, float(torch.linalg.eigvalsh(schur_II)[-1]))
