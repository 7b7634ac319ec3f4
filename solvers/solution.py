"""What a method hands to the loop (State) and what the loop hands to the user (Result)."""

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import CertificateError, ConvergenceError
from solvers.oracle import Oracle
from solvers.problem import Problem
from solvers.structure import norm

_MEMBERSHIP_UNITS = 2.0**10  # rounding allowance of the test of a normal, in units of eps


class Status(enum.Enum):
    """Why a solver stopped; the value is a full sentence."""

    CONVERGED = "The residual recomputed at the returned point is at most the tolerance."
    STOPPED = "The callback asked to stop."
    MAX_ITERATIONS = "The iteration limit was reached before the tolerance."
    MAX_CALLS = "The budget of oracle calls was used up before the tolerance."
    TIME_LIMIT = "The time limit was reached before the tolerance."
    STALLED = "The residual reached the rounding floor of the number format above the tolerance."
    DIVERGED = "The residual kept growing, however short the step."
    NONFINITE = (
        "The operator or the resolvent kept returning NaN or infinity, however short the step."
    )
    NOT_MONOTONE = "Two evaluations show that the operator is not monotone."
    ASSUMPTION_VIOLATED = (
        "Two evaluations show that the operator is not cocoercive, which this method needs."
    )
    NO_SOLUTION_SUSPECTED = (
        "The points run away while the residual stays, as they do where no solution exists."
    )


@dataclass(frozen=True, kw_only=True)
class State:
    """What the loop reads of a method's state; methods extend it.

    Attributes:
        point: Candidate solution, packed.
        normal: Element of ``G(point)``; None when ``G = 0``.
        residual: Estimate of ``|F(point) + normal|``; exact where ``exact``.
        exact: Whether ``residual`` comes from a full evaluation at ``point``.
        lipschitz: Constant in use.
        restarts: Times the anchor was moved.
        failure: Set when the method cannot continue.
        value: ``F(point)`` where a full evaluation has given it; saves the loop another one.
        detail: A sentence that the user should read; of the first or the last state.
    """

    point: Tensor
    normal: Tensor | None
    residual: float
    exact: bool
    lipschitz: float
    restarts: int = 0
    failure: Status | None = None
    value: Tensor | None = None
    detail: str = ""


class TracePoint(NamedTuple):
    """One iteration: component calls so far, residual estimate, Lipschitz constant in use."""

    calls: int
    residual: float
    lipschitz: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Outcome of :func:`solvers.solve`.

    Attributes:
        value: Best point found; structure, dtype and device of the start.
        normal: The element ``g`` of ``G(value)`` behind the residual; None when ``G = 0``.
        residual: ``|F(value) + g|`` from a full evaluation, in float64 where F accepts that.
        natural_residual: ``L |value - J(value - F(value) / L, 1 / L)|``, at most the residual.
        gap_bound: Residual times the diameter of the domain of G, which bounds the gap of a
            variational inequality, a saddle point or a convex minimum; None when unknown.
        status: Why the run ended.
        method: Name of the method.
        iterations: Steps taken.
        restarts: Times the anchor was moved.
        full_evals: Evaluations of the whole F, including the final check.
        component_evals: Evaluations of single components.
        oracle_calls: Both, in component evaluations.
        seconds: Wall time.
        lipschitz: Constant in use at the end (an estimate unless it was given as a bound).
        lipschitz_source: ``given``, ``power`` (iteration) or ``backtracked``.
        detail: What else the user should know; may be empty.
        displacement: Mean move per iteration where no solution is suspected, else None.
        trace: One point per iteration.
        state: Last state of the method, for a warm start.
    """

    value: Any
    normal: Any
    residual: float
    natural_residual: float
    gap_bound: float | None
    status: Status
    method: str
    iterations: int
    restarts: int
    full_evals: int
    component_evals: int
    oracle_calls: int
    seconds: float
    lipschitz: float
    lipschitz_source: str
    detail: str
    displacement: Any
    trace: tuple[TracePoint, ...] = field(repr=False)
    state: State = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.status is Status.CONVERGED

    @property
    def message(self) -> str:
        """The status with the figures behind it, and the detail."""
        text = (
            f"{self.status.value[:-1]} ({self.method}: residual {self.residual:.3e} after "
            f"{self.iterations} iterations and {self.oracle_calls} calls)."
        )
        return f"{text} {self.detail}".rstrip()

    def raise_for_status(self) -> "Result":
        """Return self when converged or stopped by the callback.

        Raises:
            ConvergenceError: with the message, otherwise.
        """
        if self.status in (Status.CONVERGED, Status.STOPPED):
            return self
        raise ConvergenceError(self.message)

    @torch.no_grad()
    def verify(self, problem: Problem) -> float:
        """Return the residual recomputed from the problem, the point and the normal alone.

        Args:
            problem: The problem that was solved.

        Raises:
            CertificateError: when the normal is no element of ``G(value)``.
            ShapeError: for a problem of another structure.
        """
        oracle = Oracle(problem)
        point = oracle.structure.pack(self.value, "value")
        if self.normal is None:
            if oracle.has_resolvent:
                raise CertificateError("normal: missing, although the problem has a resolvent")
            return norm(oracle.precise(point))
        normal = oracle.structure.pack(self.normal, "normal")
        step = 1 / self.lipschitz
        # g is in G(v) exactly where J(v + step g, step) = v, for any one step.
        error = norm(oracle.resolvent(point + step * normal, step) - point)
        room = _MEMBERSHIP_UNITS * torch.finfo(point.dtype).eps
        if not error <= room * (norm(point) + step * norm(normal)):
            raise CertificateError(
                f"normal: not an element of G(value), the resolvent misses the point by {error:.3e}"
            )
        return norm(oracle.precise(point) + normal)
