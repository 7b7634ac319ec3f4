"""What the methods that sample components share: certified points and constants.

A sampled estimate never leaves a method: each state that the loop sees holds a point at which all
components were evaluated, so its residual is exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from solvers.finite_sum import FiniteSumInclusion
from solvers.lipschitz import Judgement
from solvers.oracle import Oracle
from solvers.run import Solver
from solvers.sampling import Sampler
from solvers.solution import State
from solvers.structure import norm

_PROBES = 16  # components sampled to estimate L_Q
_PROBE_SIZE = 1e-3  # relative length of the displacement that does


class Certified(NamedTuple):
    """A point with all components evaluated there.

    Attributes:
        point: In the domain of G.
        normal: Element of ``G(point)``; None when ``G = 0``.
        value: ``F(point)``.
        residual: ``|value + normal|``.
    """

    point: Tensor
    normal: Tensor | None
    value: Tensor
    residual: float


@dataclass(frozen=True, kw_only=True)
class SampledState(State):
    """State of every sampled method.

    Attributes:
        value: ``F(point)``, from a full evaluation.
        mean_lipschitz: L_F, or the sampled constant where L_F is not known.
        sampler: Stream of draws; advanced by each step.
        reference: Residual at the last restart.
    """

    value: Tensor
    mean_lipschitz: float
    sampler: Sampler
    reference: float


AnySampled = TypeVar("AnySampled", bound=SampledState)


def unsampled(solver: Solver, oracle: Oracle, start: Tensor) -> State:
    """Return the first state of the method that takes over where there is nothing to sample."""
    detail = f"There is nothing to sample, so that {solver.name} took over."
    return replace(solver.init(oracle, start), detail=detail)


def certify(oracle: Oracle, point: Tensor, target: Tensor, step: float) -> Certified:
    """Return the certificate of ``point = J(target, step)``; one full evaluation."""
    value = oracle.full(point)
    normal = (target - point) / step if oracle.has_resolvent else None
    return Certified(point, normal, value, norm(value if normal is None else value + normal))


def certified_start(oracle: Oracle, start: Tensor) -> Certified:
    """Return the start moved onto the domain of G, which itself yields an element of G there.

    Raises:
        ConfigError: for an operator that is not finite there.
    """
    point = oracle.resolvent(start, 1.0)
    value = oracle.first_value(point)
    normal = start - point if oracle.has_resolvent else None
    return Certified(point, normal, value, norm(value if normal is None else value + normal))


def of_certified(found: Certified) -> dict[str, Any]:
    """Return the fields of a state at a certified point; one that overflowed has diverged."""
    return {
        "point": found.point,
        "normal": found.normal,
        "residual": found.residual if math.isfinite(found.residual) else math.inf,
        "exact": True,
        "value": found.value,
    }


def judged(
    state: AnySampled,
    found: Certified,
    holds: Callable[[Tensor, Tensor, Tensor, Tensor, float], Judgement],
) -> AnySampled:
    """Return the state at a newly certified point, with constants that its value confirms.

    Args:
        state: The state before.
        found: The new point. One that is not finite gets an infinite residual, at which the loop
            goes back to the best point with larger constants.
        holds: :func:`solvers.lipschitz.cocoercivity_holds` or ``slope_holds``.
    """
    if not math.isfinite(found.residual):
        return replace(state, **of_certified(found))
    passed, failure = holds(
        state.point, state.value, found.point, found.value, state.mean_lipschitz
    )
    if failure is not None:
        return replace(state, failure=failure)
    growth = 1.0 if passed else 2.0
    return replace(
        state,
        **of_certified(found),
        lipschitz=growth * state.lipschitz,
        mean_lipschitz=growth * state.mean_lipschitz,
    )


def constants(oracle: Oracle, point: Tensor, known: float | None, seed: int) -> dict[str, Any]:
    """Return ``lipschitz`` (sampled) and ``mean_lipschitz``, the constants to begin with.

    Args:
        oracle: The problem, a finite sum; its ``lipschitz_floor`` is respected.
        point: Where components are probed if nothing is known.
        known: The sampled constant that the problem proves, None for an estimate.
        seed: Of the estimate.
    """
    problem = oracle.problem
    if known is not None:
        oracle.lipschitz_source = "given"
    elif oracle.warm is not None:
        known = oracle.warm.lipschitz
    else:
        oracle.lipschitz_source = "backtracked"
        known = _mean_square_est(oracle, point, seed)
    sampled = max(known, oracle.lipschitz_floor) or 1.0
    # A constant that a run has contradicted says nothing for the mean either.
    mean = sampled if oracle.lipschitz_floor > known else problem.lipschitz_bound or sampled
    return {"lipschitz": sampled, "mean_lipschitz": min(mean, sampled)}


def _mean_square_est(oracle: Oracle, point: Tensor, seed: int) -> float:
    """Estimate L_Q from a few components along one random displacement; costs 32 calls."""
    problem = oracle.problem
    assert isinstance(problem, FiniteSumInclusion)
    sampler = Sampler(problem.sampling_laws(), 1, seed=seed, like=point)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(point.shape, generator=generator, dtype=torch.float64)
    probe = probe.to(point) * (_PROBE_SIZE * max(1.0, norm(point)) / norm(probe))
    squares = [
        norm(oracle.difference(point + probe, point, sampler.draw())) ** 2 for _ in range(_PROBES)
    ]
    slope = math.sqrt(sum(squares) / _PROBES) / norm(probe)
    given = problem.lipschitz_bound or problem.lipschitz_est or 0.0
    return max(slope, given) if slope < math.inf else given
