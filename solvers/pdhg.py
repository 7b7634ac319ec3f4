"""Restarted reflected Halpern iteration on the primal-dual hybrid gradient map (r2HPDHG).

For bilinear saddle points. One iteration is one product with A and one with its transpose, which
is one full evaluation, and yields an exact residual at no further cost.
Source: spec halpern_solvers 2.8 (rHPDHG, arXiv 2407.16144; cuPDLPx, arXiv 2507.14051).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from common.config import check_types, positive, within
from common.errors import ConfigError
from solvers.infeasibility import Verdict, no_solution
from solvers.iterate import register
from solvers.lipschitz import first_lipschitz
from solvers.oracle import Oracle
from solvers.primal_weight import PrimalWeight
from solvers.saddle import BilinearSaddle, Point
from solvers.scaling import Metric, precondition
from solvers.solution import State, Status
from solvers.structure import inner, norm

_NOISE_UNITS = 64.0  # rounding allowance of the energy of a move, in units of eps
_ENLARGE = 1.5  # factor on a norm of the coupling that a step contradicts


@dataclass(frozen=True, kw_only=True)
class PDHGState(State):
    """State of the method; ``point`` is the last point before reflection and anchoring.

    Attributes:
        normal: Element of G there.
        value: F there.
        iterate: z.
        field: ``F(z)``.
        anchor: z at the last restart.
        anchor_field: F there.
        metric: Step lengths.
        weight: Primal weight and its controller.
        count: Iterations since the restart.
        total: Iterations.
        reference: Fixed-point error of the first iteration after the restart.
        checked: Fixed-point error at the last check.
        verdict: Which side was found to have no solution, if any.
    """

    normal: Tensor
    value: Tensor
    iterate: Tensor
    field: Tensor
    anchor: Tensor
    anchor_field: Tensor
    metric: Metric
    weight: PrimalWeight
    count: int = 0
    total: int = 0
    reference: float = math.inf
    checked: float = math.inf
    verdict: Verdict | None = None


@register
@dataclass(frozen=True, kw_only=True)
class PrimalDualHybridGradient:
    """The method of choice for matrix games and linear programmes.

    Attributes:
        reflection: rho in [0, 1]; 0 is plain restarted Halpern PDHG.
        step_scale: Root of ``tau sigma |A|^2`` in (0, 1).
        restart: Whether the anchor ever moves.
        check_every: Iterations between two restart tests.
        sufficient: Ratio of the fixed-point error that restarts at once, in (0, 1).
        necessary: Ratio that restarts when the error has stopped to fall, in (0, 1).
        artificial: Share of all iterations that restarts whatever the error, in (0, 1].
        adapt_weight: Whether restarts adapt the primal weight.
        primal_weight: First primal weight, above 0; None takes the ratio of the diameters of the
            domains, or of the norms of cost and offset where these are unbounded.
        diagonal: Whether problems with a known matrix and separable resolvents are preconditioned.
    """

    name: ClassVar[str] = "pdhg"
    reflection: float = 1.0
    step_scale: float = 0.998
    restart: bool = True
    check_every: int = 10
    sufficient: float = 0.2
    necessary: float = 0.5
    artificial: float = 0.36
    adapt_weight: bool = True
    primal_weight: float | None = None
    diagonal: bool = True

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_types(self)
        within("reflection", self.reflection, 0.0, 1.0)
        positive("check_every", self.check_every)
        for name in ("step_scale", "sufficient", "necessary"):
            positive(name, getattr(self, name))
            within(name, getattr(self, name), 0.0, 1 - 1e-6)
        positive("artificial", self.artificial)
        within("artificial", self.artificial, 0.0, 1.0)
        if self.primal_weight is not None:
            positive("primal_weight", self.primal_weight)

    def init(self, oracle: Oracle, start: Tensor) -> PDHGState:
        """Evaluate F at the start, moved onto the domain of G first.

        Raises:
            ConfigError: for a problem that is no bilinear saddle point, or F not finite.
        """
        problem = _saddle(oracle)
        point = oracle.resolvent(start, 1.0)
        field, normal = oracle.first_value(point), start - point
        lipschitz = first_lipschitz(oracle, point, field)
        metric = Metric(1.0, 1.0, lipschitz)
        if self.diagonal and problem.matrix is not None and problem.is_separable:
            metric = precondition(problem.matrix)
        return PDHGState(
            point=point,
            normal=normal,
            residual=norm(field + normal),
            # It is exact, but the loop takes growth of what is so called for divergence, and here
            # a changed primal weight may let the residual grow for a while.
            exact=False,
            lipschitz=lipschitz,
            value=field,
            iterate=point,
            field=field,
            anchor=point,
            anchor_field=field,
            metric=metric,
            weight=self._first_weight(oracle, problem, metric),
        )

    def step(self, oracle: Oracle, state: PDHGState) -> PDHGState:
        """Take one step, then restart where the fixed-point error asks for it."""
        following = _advance(oracle, state, self.step_scale)
        if following.failure is not None:
            return following
        moved = state.iterate - following.point
        # The squared length of the move in the metric of the method, up to a constant factor.
        energy = inner(moved, following.value + following.normal)
        if energy < 0 and energy < -_noise(state, moved):
            return _enlarged(state)
        error = math.sqrt(max(0.0, energy))
        if state.count == 0:
            following = replace(following, reference=error)
        if following.total % self.check_every == 0:
            if verdict := _verdict(oracle, state, following):
                return replace(following, failure=Status.NO_SOLUTION_SUSPECTED, verdict=verdict)
            if self.restart and self._is_due(following, error):
                return self._restarted(oracle, following)
            following = replace(following, checked=error)
        return self._anchored(state, following)

    def _anchored(self, state: PDHGState, following: PDHGState) -> PDHGState:
        """Return the new state with its iterate reflected and drawn to the anchor."""
        share = (state.count + 1) / (state.count + 2)
        new, old = share * (1 + self.reflection), -share * self.reflection
        # F is affine and the weights add up to 1, so F of the mean is the mean of F.
        point = new * following.point + old * state.iterate + (1 - share) * state.anchor
        field = new * following.value + old * state.field + (1 - share) * state.anchor_field
        return replace(following, iterate=point, field=field)

    def _first_weight(
        self, oracle: Oracle, problem: BilinearSaddle, metric: Metric
    ) -> PrimalWeight:
        if self.primal_weight is not None:
            return PrimalWeight(value=self.primal_weight, best=self.primal_weight)
        if isinstance(oracle.warm, PDHGState):
            return oracle.warm.weight
        of_x, of_y = (
            problem.primal.diameter(problem.cost),
            problem.dual.diameter(problem.offset),
        )
        if of_x and of_y:
            # Bounded domains know how far x and y can move; the data need not.
            weight = of_y / of_x
        else:
            cost, offset = norm(problem.cost * metric.column), norm(problem.offset * metric.row)
            weight = (cost + 1) / (offset + 1)
        return PrimalWeight(value=weight, best=weight)

    def _is_due(self, state: PDHGState, error: float) -> bool:
        """Say whether the anchor should move (spec 2.8)."""
        if state.restarts == 0 or error <= self.sufficient * state.reference:
            return True
        if error <= self.necessary * state.reference and error > state.checked:
            return True
        return state.count >= self.artificial * state.total

    def _restarted(self, oracle: Oracle, state: PDHGState) -> PDHGState:
        """Return the state with its anchor at the last un-reflected point."""
        weight = _adapted(oracle, state) if self.adapt_weight else state.weight
        return replace(
            state,
            iterate=state.point,
            field=state.value,
            anchor=state.point,
            anchor_field=state.value,
            weight=weight,
            count=0,
            checked=math.inf,
            restarts=state.restarts + 1,
        )


def _saddle(oracle: Oracle) -> BilinearSaddle:
    if not isinstance(oracle.problem, BilinearSaddle):
        raise ConfigError(
            "method=pdhg: needs the parts of a bilinear saddle point, and this problem shows its "
            "operator only; build it with bilinear_saddle, or use method=forb"
        )
    return oracle.problem


def _advance(oracle: Oracle, state: PDHGState, scale: float) -> PDHGState:
    """Apply the primal-dual hybrid gradient map to the iterate; one full evaluation.

    Returns:
        The state at the new point, with F and an element of G there.
    """
    problem = _saddle(oracle)
    (x, y), (field_x, field_y) = _parts(oracle, state.iterate), _parts(oracle, state.field)
    tau, sigma = state.metric.steps(scale, state.weight.value)
    oracle.full_evals += 1
    new_x = problem.primal(x - tau * field_x, tau)
    new_field_y = problem.gradient_y(new_x)
    extrapolated = 2 * new_field_y - field_y
    new_y = problem.dual(y - sigma * extrapolated, sigma)
    value = oracle.structure.pack((problem.gradient_x(new_y), new_field_y), "operator")
    normal = oracle.structure.pack(
        ((x - new_x) / tau - field_x, (y - new_y) / sigma - extrapolated), "resolvent"
    )
    residual = norm(value + normal)
    if not math.isfinite(residual):
        return replace(state, failure=Status.NONFINITE)
    return replace(
        state,
        point=oracle.structure.pack((new_x, new_y), "resolvent"),
        normal=normal,
        residual=residual,
        value=value,
        count=state.count + 1,
        total=state.total + 1,
    )


def _adapted(oracle: Oracle, state: PDHGState) -> PrimalWeight:
    """Return the primal weight after a restart of this state."""
    problem = _saddle(oracle)
    moved_x, moved_y = _parts(oracle, state.point - state.anchor)
    dual, primal = _parts(oracle, state.value + state.normal)
    return state.weight.updated(
        (norm(moved_x / state.metric.column), norm(moved_y / state.metric.row)),
        (norm(primal) / (1 + norm(problem.offset)), norm(dual) / (1 + norm(problem.cost))),
    )


def _verdict(oracle: Oracle, state: PDHGState, following: PDHGState) -> Verdict | None:
    ray = _parts(oracle, following.point - state.iterate)
    return no_solution(_saddle(oracle), ray, _parts(oracle, following.value - state.field))


def _enlarged(state: PDHGState) -> PDHGState:
    """Return the state before a step that showed the norm of the coupling to be too small."""
    metric = state.metric._replace(coupling=_ENLARGE * state.metric.coupling)
    return replace(
        state,
        metric=metric,
        lipschitz=_ENLARGE * state.lipschitz,
        anchor=state.iterate,
        anchor_field=state.field,
        count=0,
        checked=math.inf,
        restarts=state.restarts + 1,
    )


def _noise(state: PDHGState, moved: Tensor) -> float:
    """Return the rounding error of the energy of a move, from the terms that cancel in it."""
    size = norm(state.field) + state.lipschitz * (norm(state.iterate) + norm(moved))
    return _NOISE_UNITS * torch.finfo(moved.dtype).eps * norm(moved) * size


def _parts(oracle: Oracle, packed: Tensor) -> Point:
    """Return the primal and the dual part of a packed vector."""
    x, y = oracle.structure.unpack(packed)
    return x, y
