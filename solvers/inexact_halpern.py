"""Inexact Halpern iteration for finite sums that are monotone and Lipschitz on average.

``u_{k+1} = u_0/(k+2) + (k+1)/(k+2) J(u_k)`` with ``J`` the resolvent of ``eta (F + G)``, computed
by sampling. The answer is the output of the resolvent, never the anchored iterate.
Source: arXiv 2310.02987, Algorithm 2, after spec halpern_solvers 2.6 and 2.7.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from common.config import check_types, positive, within
from solvers.extragradient import Anchored, AnchoredExtragradient, FastExtragradient
from solvers.finite_sum import FiniteSumInclusion, Sampling
from solvers.iterate import register
from solvers.lipschitz import slope_holds
from solvers.oracle import Oracle
from solvers.sampled import (
    Certified,
    SampledState,
    certified_start,
    certify,
    constants,
    judged,
    of_certified,
    unsampled,
)
from solvers.sampling import Sampler
from solvers.solution import State, Status
from solvers.structure import norm
from solvers.vr_forb import Inner, Proximal, batch_lipschitz, vr_forb

_MOST_EPOCHS = 200  # passes after which a certified inner loop gives up (spec 2.6)
_TOO_ACCURATE = "The inner loop did not reach its accuracy; raise accuracy, or use inner=fixed."
_AUTHORS = {"inner_epochs": 0.05, "step_scale": 5.0}


@dataclass(frozen=True, kw_only=True)
class InexactState(SampledState):
    """State after one resolvent.

    Attributes:
        iterate: ``u_k``.
        anchor: ``u_0`` of the current restart.
        count: ``k`` since the restart.
    """

    iterate: Tensor
    anchor: Tensor
    count: int = 0


@register
@dataclass(frozen=True, kw_only=True)
class InexactHalpern:
    """Algorithm 2; one step of the loop is one resolvent.

    Attributes:
        seed: Of the sampled components and coins.
        restart_factor: Residual ratio that moves the anchor, in [0, 1); 0 never does. A resolvent
            this long shrinks residuals fast: 0.1 takes 40 % fewer calls than 0.5 on bilinear sums.
        inner: ``fixed`` takes ``m (N/b) ln(k+2) + 1`` steps; ``certified`` stops at the first
            snapshot whose proved error is at most ``accuracy / (k+2)`` of the move.
        inner_epochs: ``m``; None is 1 with restarts and 0.3 without.
        accuracy: Of a certified inner loop; None is 0.5, or 0.1 when reflecting.
        outer_scale: ``eta L_b sqrt(b/N)``; 1 balances inner and outer cost.
        step_scale: Inner step in units of ``sqrt(p (1-p)) / L``; proofs need 0.5.
        batch: b, components of one sampled difference; more suit a GPU.
        implicit: Treat the identity of the inner problem exactly, which allows longer steps.
        reflect: Anchor ``2 J - I`` instead of ``J``; use with restarts.
        sampling: Law; ``auto`` is the problem's own.
        residual_at: ``anchored`` measures at ``u_{k+1}``, for comparison with the paper.
        authors_compat: The published scripts: ``m = 0.05``, five times the inner step, no
            restart, snapshots that never move, the residual at the anchored iterate.
    """

    name: ClassVar[str] = "inexact_halpern"
    seed: int = 0
    restart_factor: float = 0.1
    inner: Literal["fixed", "certified"] = "fixed"
    inner_epochs: float | None = None
    accuracy: float | None = None
    outer_scale: float = 1.0
    step_scale: float = 1.0
    batch: int = 1
    implicit: bool = True
    reflect: bool = False
    sampling: Sampling = "auto"
    residual_at: Literal["resolvent", "anchored"] = "resolvent"
    authors_compat: bool = False

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        within("restart_factor", self.restart_factor, 0.0, 1 - 1e-6)
        for name in ("outer_scale", "step_scale", "batch", "inner_epochs", "accuracy"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)

    def init(self, oracle: Oracle, start: Tensor) -> State:
        """Evaluate all components at the start; one component alone leaves nothing to sample.

        Raises:
            ConfigError: for an operator that is not finite there, or a law that is not known.
        """
        problem = oracle.problem
        if not isinstance(problem, FiniteSumInclusion) or problem.num_components == 1:
            return unsampled(_plain(oracle), oracle, start)
        found = certified_start(oracle, start)
        known = problem.mean_square_bound(self.sampling)
        batch = min(self.batch, problem.num_components)
        laws = problem.sampling_laws(self.sampling)
        return InexactState(
            **of_certified(found),
            **constants(oracle, found.point, known, self.seed),
            sampler=Sampler(laws, batch, seed=self.seed, like=start),
            reference=found.residual,
            iterate=found.point,
            anchor=found.point,
        )

    def step(self, oracle: Oracle, state: State) -> State:
        """Compute one resolvent, anchor it, and restart where that pays."""
        if not isinstance(state, InexactState):
            return _plain(oracle).step(oracle, state)  # type: ignore[arg-type]
        inner = self._solve(oracle, state, self.proximal(oracle.num_components, state))
        found = inner.found
        weight = 1 / (state.count + 2)
        mapped = 2 * found.point - state.iterate if self.reflect else found.point
        iterate = weight * state.anchor + (1 - weight) * mapped
        if self.residual_at == "anchored" or self.authors_compat:
            found = _at_iterate(oracle, iterate, state.mean_lipschitz)
        arrived = judged(state, found, slope_holds)
        if not inner.accepted:
            arrived = replace(arrived, failure=Status.STALLED, detail=_TOO_ACCURATE)
        factor = 0.0 if self.authors_compat else self.restart_factor
        if arrived.failure or arrived.residual > factor * state.reference:
            return replace(arrived, iterate=iterate, count=state.count + 1)
        return replace(
            arrived,
            iterate=arrived.point,
            anchor=arrived.point,
            count=0,
            reference=arrived.residual,
            restarts=state.restarts + 1,
        )

    def proximal(self, size: int, state: InexactState) -> Proximal:
        """Return the inner problem at the state's iterate for a sum of ``size`` components."""
        batch = state.sampler.batch
        batched = batch_lipschitz(state.mean_lipschitz, state.lipschitz, batch)
        eta = self.outer_scale * math.sqrt(size / batch) / batched
        probability = min(batch / size, 0.5)
        scale = _AUTHORS["step_scale"] if self.authors_compat else self.step_scale
        whole = eta * batched + (0.0 if self.implicit else 1.0)
        return Proximal(
            center=state.iterate,
            eta=eta,
            tau=scale * math.sqrt(probability * (1 - probability)) / whole,
            probability=probability,
            full_lipschitz=1 + eta * state.mean_lipschitz,
            implicit=self.implicit,
            moving=not self.authors_compat,
        )

    def _solve(self, oracle: Oracle, state: InexactState, problem: Proximal) -> Inner:
        warm = Certified(state.point, state.normal, state.value, state.residual)
        passes = oracle.num_components / state.sampler.batch
        if self.inner == "fixed" or self.authors_compat:
            steps = self._num_steps(passes, state.count)
            return vr_forb(oracle, state.sampler, problem, warm, steps)
        accuracy = self.accuracy or (0.1 if self.reflect else 0.5)

        def accept(found: Certified) -> bool:
            error = problem.error_bound(oracle, found)
            moved = norm(found.point - state.iterate)
            return error <= accuracy / (state.count + 2) * max(moved - error, 0.0)

        limit = math.ceil(_MOST_EPOCHS * passes)
        return vr_forb(oracle, state.sampler, problem, warm, limit, accept)

    def _num_steps(self, passes: float, count: int) -> int:
        if self.authors_compat:
            return math.floor(_AUTHORS["inner_epochs"] * passes * math.log(count + 2))
        epochs = self.inner_epochs or (1.0 if self.restart_factor else 0.3)
        return math.ceil(epochs * passes * math.log(count + 2)) + 1


def _plain(oracle: Oracle) -> Anchored:
    """Return the deterministic method for a single component."""
    return AnchoredExtragradient() if oracle.has_resolvent else FastExtragradient()


def _at_iterate(oracle: Oracle, iterate: Tensor, lipschitz: float) -> Certified:
    """Return the certificate at an anchored iterate, one forward-backward step on where G != 0."""
    if not oracle.has_resolvent:
        return certify(oracle, iterate, iterate, 1.0)
    step = 1 / lipschitz
    target = iterate - step * oracle.full(iterate)
    return certify(oracle, oracle.resolvent(target, step), target, step)
