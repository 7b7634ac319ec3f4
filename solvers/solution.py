"""What a solver returns: a point, the residual recomputed there, and why it stopped."""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.errors import ConvergenceError


class Status(enum.Enum):
    """Why a solver stopped; the value is a full sentence."""

    CONVERGED = "The residual recomputed at the returned point is at most the tolerance."
    STOPPED = "The callback asked to stop."
    MAX_ITERATIONS = "The iteration limit was reached before the tolerance."
    MAX_CALLS = "The budget of oracle calls was used up before the tolerance."
    STALLED = "The residual reached the rounding floor of the number format above the tolerance."
    NONFINITE = "The operator kept returning NaN or infinity, however short the step."
    NOT_MONOTONE = "Two evaluations show that the operator is not monotone."
    ASSUMPTION_VIOLATED = (
        "Two evaluations show that the operator is not cocoercive, which this method needs."
    )


class TracePoint(NamedTuple):
    """One iteration: component calls so far, residual estimate, Lipschitz constant in use."""

    calls: int
    residual: float
    lipschitz: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Outcome of :func:`solvers.solve`.

    Attributes:
        value: Best point found; shape, dtype and device of the start.
        residual: Norm of an explicit element of ``F(value) + G(value)``, from a full evaluation.
        status: Why the run ended.
        method: Name of the method.
        iterations: Steps taken.
        restarts: Times the anchor was moved.
        oracle_calls: Component evaluations, including the final check.
        seconds: Wall time.
        lipschitz: Constant in use at the end (an estimate unless it was given as a bound).
        trace: One point per iteration.
    """

    value: Any
    residual: float
    status: Status
    method: str
    iterations: int
    restarts: int
    oracle_calls: int
    seconds: float
    lipschitz: float
    trace: tuple[TracePoint, ...]

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.status is Status.CONVERGED

    @property
    def message(self) -> str:
        """One sentence with the status and the figures behind it."""
        return (
            f"{self.status.value[:-1]} ({self.method}: residual {self.residual:.3e} after "
            f"{self.iterations} iterations and {self.oracle_calls} calls)."
        )

    def raise_for_status(self) -> "Result":
        """Return self when converged or stopped by the callback.

        Raises:
            ConvergenceError: with the message, otherwise.
        """
        if self.status in (Status.CONVERGED, Status.STOPPED):
            return self
        raise ConvergenceError(self.message)
