"""Variance-reduced extragradient, the unanchored baseline for finite sums.

Two component calls per step; linear convergence where the problem is well conditioned, no rate on
the residual elsewhere. Source: spec halpern_solvers 2.9 (Alacaoglu and Malitsky's method).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from common.config import check_types, positive
from solvers.extragradient import Extragradient
from solvers.finite_sum import FiniteSumInclusion, Sampling
from solvers.iterate import register
from solvers.lipschitz import slope_holds
from solvers.oracle import Oracle
from solvers.sampled import (
    SampledState,
    certified_start,
    certify,
    constants,
    judged,
    of_certified,
    unsampled,
)
from solvers.sampling import Sampler
from solvers.solution import State


@register
@dataclass(frozen=True, kw_only=True)
class VRExtragradient:
    """One step of the loop runs to the next snapshot, on average N steps of the method.

    Attributes:
        seed: Of the sampled components and coins.
        step_scale: ``tau L_Q / sqrt(p)`` with p = 1/N; theory needs less than 1.
        sampling: Law; ``auto`` is the problem's own.
        authors_compat: The published script of the matrix game: three times the step.
    """

    name: ClassVar[str] = "vr_extragradient"
    seed: int = 0
    step_scale: float = 0.99
    sampling: Sampling = "auto"
    authors_compat: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        positive("step_scale", self.step_scale)

    def init(self, oracle: Oracle, start: Tensor) -> State:
        """Evaluate all components at the start; one component alone leaves nothing to sample.

        Raises:
            ConfigError: for an operator that is not finite there, or a law that is not known.
        """
        problem = oracle.problem
        if not isinstance(problem, FiniteSumInclusion) or problem.num_components == 1:
            return unsampled(Extragradient(), oracle, start)
        found = certified_start(oracle, start)
        known = problem.mean_square_bound(self.sampling)
        laws = problem.sampling_laws(self.sampling)
        return SampledState(
            **of_certified(found),
            **constants(oracle, found.point, known, self.seed),
            sampler=Sampler(laws, 1, seed=self.seed, like=start),
            reference=found.residual,
        )

    def step(self, oracle: Oracle, state: State) -> State:
        """Iterate until the coin asks for a new snapshot."""
        if not isinstance(state, SampledState):
            return Extragradient().step(oracle, state)  # type: ignore[arg-type]
        probability = 1 / oracle.num_components
        scale = 3.0 if self.authors_compat else self.step_scale
        tau = scale * math.sqrt(probability) / state.lipschitz
        sampler, snapshot, point = state.sampler, state.point, state.point
        pull = probability * snapshot - tau * state.value
        while True:
            base = (1 - probability) * point + pull
            half = oracle.resolvent(base, tau)
            target = base - tau * oracle.difference(half, snapshot, sampler.draw())
            point = oracle.resolvent(target, tau)
            if sampler.coin(probability):
                return judged(state, certify(oracle, point, target, tau), slope_holds)
