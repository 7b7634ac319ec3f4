"""Balance between primal and dual steps, adapted at restarts by a PID controller.

Source: spec halpern_solvers 2.8 (the controller of cuPDLPx, arXiv 2507.14051).
"""

import math
from dataclasses import dataclass, replace

_PROPORTIONAL, _INTEGRAL, _MEMORY = 0.99, 0.01, 0.3  # the derivative gain is 0
_MOVED = (1e-16, 1e12)  # distances outside say nothing about the balance
_BALANCE = (1e-8, 1e8)  # nor do such ratios of the residuals


@dataclass(frozen=True, kw_only=True)
class PrimalWeight:
    """Primal weight ``omega``: the primal step is ``eta / omega``, the dual one ``eta omega``.

    Attributes:
        value: omega, above 0.
        integral: Decaying sum of the controller's errors.
        best: The omega at which the two residuals were closest.
        imbalance: ``|log10|`` of their ratio there.
    """

    value: float = 1.0
    integral: float = 0.0
    best: float = 1.0
    imbalance: float = math.inf

    def updated(self, moved: tuple[float, float], residuals: tuple[float, float]) -> "PrimalWeight":
        """Return the weight after a restart.

        Args:
            moved: Distances of x and of y from the last anchor, in the preconditioned metric.
            residuals: Relative primal and dual residual.
        """
        primal, dual = residuals
        ratio = dual / primal if primal > 0 else math.inf
        weight = self
        if 0 < ratio < math.inf and (imbalance := abs(math.log10(ratio))) < self.imbalance:
            weight = replace(weight, best=self.value, imbalance=imbalance)
        usable = all(_MOVED[0] < size < _MOVED[1] for size in moved)
        if not usable or not _BALANCE[0] < ratio < _BALANCE[1]:
            return replace(weight, value=weight.best, integral=0.0)
        error = math.log(moved[1] / moved[0]) - math.log(self.value)
        integral = _MEMORY * self.integral + error
        change = math.exp(_PROPORTIONAL * error + _INTEGRAL * integral)
        return replace(weight, value=self.value * change, integral=integral)
