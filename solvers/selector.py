"""Which method suits a problem: the default of each class, and why.

Source: spec halpern_solvers 0 and 1.3.
"""

from typing import NamedTuple

from solvers.finite_sum import FiniteSumInclusion
from solvers.problem import Problem
from solvers.saddle import BilinearSaddle

_LEAST_COMPONENTS = 200  # below this, sampling was never measured to pay
_GAIN = 4.0  # variance reduction pays from N > (4 L_Q / L_F)^2
_COCOERCIVE_GAIN = 2.0  # and for cocoercive sums up to L_sampled = 2 L_F


class Choice(NamedTuple):
    """A method, the reason in a sentence, and what to use if its assumption fails."""

    method: str
    reason: str
    fallback: str | None = None


def choose(problem: Problem) -> Choice:
    """Return the default method for a problem.

    Args:
        problem: What is to be solved; declared properties and constants decide, F is not asked.
    """
    if isinstance(problem, BilinearSaddle):
        return Choice("pdhg", "the problem is a bilinear saddle point whose parts are known")
    monotone = "feg" if problem.resolvent is None else "eag"
    if isinstance(problem, FiniteSumInclusion) and problem.num_components >= _LEAST_COMPONENTS:
        sampled = _sampled(problem)
        if sampled is not None:
            return sampled
    if problem.cocoercive:
        return Choice("halpern_restarted", "F is cocoercive and sampling would not pay", monotone)
    if problem.cocoercive is None:
        reason = f"nothing says that F is not cocoercive; should it prove so, {monotone} is next"
        return Choice("halpern_restarted", reason, monotone)
    return Choice(monotone, "F is monotone, not cocoercive, and sampling would not pay")


def _sampled(problem: FiniteSumInclusion) -> Choice | None:
    """Return the variance-reduced method where the constants say that it pays."""
    size, mean = problem.num_components, problem.lipschitz_bound
    if not mean:
        return None
    if problem.cocoercive:
        sampled = problem.average_cocoercivity()
        if sampled is not None and sampled <= _COCOERCIVE_GAIN * mean:
            reason = (
                f"F has {size} cocoercive components with L_sampled={sampled:.3g} close to "
                f"L_F={mean:.3g}"
            )
            return Choice("vr_halpern", reason)
        return None
    square = problem.mean_square_bound()
    if square is not None and size > (_GAIN * square / mean) ** 2:
        least = (_GAIN * square / mean) ** 2
        reason = f"F has {size} components, more than (4 L_Q / L_F)^2 = {least:.3g}"
        return Choice("inexact_halpern", reason)
    return None
