"""Variance-reduced Halpern iteration for finite sums that are cocoercive on average.

``u_{i+1} = J(l_i u_0 + (1 - l_i) u_i - eta F~_i)``, where the recursive estimator F~ (PAGE) is
refreshed by a full evaluation with probability p_i and else moves by a sampled difference.
Source: arXiv 2310.02987, Algorithm 1, after spec halpern_solvers 2.5 and 2.7.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from common.config import check_types, positive, within
from common.errors import ConfigError
from solvers.finite_sum import FiniteSumInclusion
from solvers.halpern import RestartedHalpern
from solvers.iterate import register
from solvers.lipschitz import cocoercivity_holds, slope_holds
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


class _Preset(NamedTuple):
    """Parameters that belong together; ``anchor`` is (a, b) of the weight a / (i + b)."""

    step_scale: float
    anchor: tuple[int, int]
    restart_factor: float
    sampling: str
    replacement: bool


_PRESETS = {
    "practical": _Preset(1.0, (1, 2), 0.5, "auto", True),
    "published": _Preset(0.25, (2, 4), 0.0, "uniform", False),
    "authors": _Preset(5.0, (2, 4), 0.0, "uniform", False),
}


@dataclass(frozen=True, kw_only=True)
class PageState(SampledState):
    """State after a full evaluation.

    Attributes:
        anchor: ``u_0`` of the current restart.
        count: Iterations since the restart.
        age: Iterations since the first; it drives the probability of a full evaluation.
    """

    anchor: Tensor
    count: int = 0
    age: int = 0


@register
@dataclass(frozen=True, kw_only=True)
class VRHalpern:
    """Algorithm 1; one step of the loop runs to the next full evaluation.

    Attributes:
        parameters: ``practical`` (importance sampling, eta = 1/L, weights 1/(i+2), restarts) or
            ``published`` (uniform, eta = 1/(4 L), weights 2/(i+4); without replacement unless rows
            and columns of a matrix are drawn).
        seed: Of the sampled components and coins.
        step_scale: ``eta L``; None is the preset's.
        restart_factor: Residual ratio that moves the anchor, in [0, 1); None is the preset's.
        batch: Components of a sampled difference; None is ``floor(sqrt(N))``.
        probability: Constant probability of a full evaluation; None is the paper's schedule.
        authors_compat: The published scripts: eta = 5 / L_Q, and no refusal of operators that
            are not cocoercive.
    """

    name: ClassVar[str] = "vr_halpern"
    parameters: Literal["practical", "published"] = "practical"
    seed: int = 0
    step_scale: float | None = None
    restart_factor: float | None = None
    batch: int | None = None
    probability: float | None = None
    authors_compat: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        if self.step_scale is not None:
            positive("step_scale", self.step_scale)
        if self.restart_factor is not None:
            within("restart_factor", self.restart_factor, 0.0, 1 - 1e-6)
        if self.probability is not None:
            within("probability", self.probability, 1e-9, 1.0)
        if self.batch is not None:
            positive("batch", self.batch)

    @property
    def preset(self) -> _Preset:
        """The parameters in use, with the settings given explicitly in place."""
        chosen = _PRESETS["authors" if self.authors_compat else self.parameters]
        names = ("step_scale", "restart_factor")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return chosen._replace(**given)

    def init(self, oracle: Oracle, start: Tensor) -> State:
        """Evaluate all components at the start; one component alone leaves nothing to sample.

        Raises:
            ConfigError: for an operator that is declared not cocoercive, is not finite, or is no
                finite sum.
        """
        problem = oracle.problem
        if problem.cocoercive is False and not self.authors_compat:
            raise ConfigError(
                f"method={self.name}: needs components that are cocoercive on average, and this "
                "problem is declared not to be (a bilinear coupling never is; the recursion then "
                "diverges); use method=inexact_halpern"
            )
        if not isinstance(problem, FiniteSumInclusion) or problem.num_components == 1:
            return unsampled(RestartedHalpern(), oracle, start)
        size, preset = problem.num_components, self.preset
        found = certified_start(oracle, start)
        known = problem.average_cocoercivity(preset.sampling)
        if known is None or self.authors_compat:
            known = problem.mean_square_bound("auto" if self.authors_compat else preset.sampling)
        laws = problem.sampling_laws(preset.sampling)
        sampler = Sampler(
            laws,
            math.isqrt(size) if self.batch is None else min(self.batch, size),
            seed=self.seed,
            like=start,
            replacement=preset.replacement or len(laws) > 1,
        )
        return PageState(
            **of_certified(found),
            **constants(oracle, found.point, known, self.seed),
            sampler=sampler,
            reference=found.residual,
            anchor=found.point,
        )

    def step(self, oracle: Oracle, state: State) -> State:
        """Iterate until the coin asks for a full evaluation, then restart if that pays."""
        if not isinstance(state, PageState):
            return RestartedHalpern().step(oracle, state)  # type: ignore[arg-type]
        preset, sampler = self.preset, state.sampler
        eta = preset.step_scale / state.lipschitz
        over, shift = preset.anchor
        point, estimate, count, age = state.point, state.value, state.count, state.age
        while True:
            weight = over / (count + shift)
            target = weight * state.anchor + (1 - weight) * point - eta * estimate
            following = oracle.resolvent(target, eta)
            count, age = count + 1, age + 1
            if sampler.coin(self._probability(age, oracle.num_components)):
                break
            estimate = estimate + oracle.difference(following, point, sampler.draw())
            point = following
        found = certify(oracle, following, target, eta)
        holds = slope_holds if self.authors_compat else cocoercivity_holds
        arrived = judged(replace(state, count=count, age=age), found, holds)
        if arrived.failure or arrived.residual > preset.restart_factor * state.reference:
            return arrived
        return replace(
            arrived,
            anchor=arrived.point,
            count=0,
            reference=arrived.residual,
            restarts=state.restarts + 1,
        )

    def _probability(self, age: int, size: int) -> float:
        if self.probability is not None:
            return self.probability
        if age <= 1:
            return 1.0
        root = math.sqrt(size)
        return 4 / (age + 4) if age <= root + 1 else 4 / (root + 5)
