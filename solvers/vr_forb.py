"""Variance-reduced forward-reflected-backward: one resolvent of ``eta (F + G)`` by sampling.

It solves ``0 in (v - center) + eta F(v) + eta G(v)``, which is 1-strongly monotone, with two
component calls per step and a full evaluation at random snapshots; at each snapshot the distance
to the solution has a computable bound. Source: spec halpern_solvers 2.6 (Alacaoglu, Malitsky and
Cevher's retracted variant); deviation: the batch constant of ``batch_lipschitz``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.oracle import Oracle
from solvers.sampled import Certified, certify
from solvers.sampling import Sampler
from solvers.structure import norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Proximal:
    """The regularised problem and the steps that solve it.

    Attributes:
        center: ``u_k``.
        eta: Outer step.
        tau: Inner step.
        probability: Of a new snapshot, in (0, 1).
        full_lipschitz: ``1 + eta L_F``, for the error bound.
        implicit: Treat ``v - center`` exactly rather than by a forward step.
        moving: Whether a snapshot moves to the current point; the published scripts never do.
    """

    center: Tensor
    eta: float
    tau: float
    probability: float
    full_lipschitz: float
    implicit: bool = False
    moving: bool = True

    @property
    def divisor(self) -> float:
        """Factor by which the implicit identity divides the step."""
        return 1 + self.tau if self.implicit else 1.0

    @property
    def keep(self) -> float:
        """Weight of the current point in a step."""
        keep = 1 - self.probability
        return keep / self.divisor if self.implicit else keep - self.tau

    @property
    def step(self) -> float:
        """Length of the step along F and G."""
        return self.tau * self.eta / self.divisor

    def shift(self, snapshot: Certified, previous: Tensor) -> Tensor:
        """Return the part of a step that is fixed between snapshots."""
        pull = self.probability * snapshot.point
        slope = self.eta * snapshot.value - self.center
        if self.implicit:
            return (pull - self.tau * slope) / self.divisor
        return pull - self.tau * (snapshot.point + slope - previous)

    def error_bound(self, oracle: Oracle, found: Certified) -> float:
        """Return a bound of the distance from a certified point to the exact resolvent.

        Strong monotonicity with constant 1: any element of the regularised operator at a point
        is at least as long as its distance to the zero (spec 2.6; both forms, the smaller one).
        """
        moved = found.point - self.center
        value = moved + self.eta * found.value
        if found.normal is None:
            return norm(value)
        tau = 1 / self.full_lipschitz
        ahead = oracle.resolvent(found.point - tau * value, tau * self.eta)
        natural = 2 * self.full_lipschitz * norm(found.point - ahead)
        return min(natural, norm(value + self.eta * found.normal))


class Inner(NamedTuple):
    """Outcome of an inner loop: certified point, steps taken, whether ``accept`` was met."""

    found: Certified
    num_steps: int
    accepted: bool


def batch_lipschitz(mean: float, mean_square: float, batch: int) -> float:
    """Return the mean-square constant of the average of ``batch`` independent components.

    ``E |F_S(u) - F_S(v)|^2 = (1 - 1/b) |F(u) - F(v)|^2 + (1/b) E |F_q(u) - F_q(v)|^2``; the form
    ``L_F^2 + L_Q^2 / b`` of spec 4.5 is an upper bound of it and too large at b = 1.
    """
    return math.sqrt((1 - 1 / batch) * mean**2 + mean_square**2 / batch)


def vr_forb(
    oracle: Oracle,
    sampler: Sampler,
    problem: Proximal,
    warm: Certified,
    num_steps: int,
    accept: Callable[[Certified], bool] | None = None,
) -> Inner:
    """Approximate the resolvent of ``eta (F + G)`` at ``problem.center``.

    Args:
        oracle: Counts two calls per drawn component and N per snapshot.
        sampler: Draws and coins.
        problem: Center and steps.
        warm: First snapshot; its value is known and costs nothing.
        num_steps: Steps to take, or the limit where ``accept`` is given.
        accept: Asked at each snapshot, the first one included; a true value stops there.

    Returns:
        The last point with a full evaluation there.
    """
    if accept is not None and accept(warm):
        return Inner(warm, 0, True)
    snapshot, previous, point, target = warm, warm.point, warm.point, warm.point
    shift, is_fresh = problem.shift(snapshot, previous), True
    keep, step = problem.keep, problem.step
    for number in range(1, num_steps + 1):
        noise = oracle.difference(point, previous, sampler.draw())
        target = torch.add(shift, point, alpha=keep).sub_(noise, alpha=step)
        point = oracle.resolvent(target, step)
        if previous is not snapshot.point:
            previous = snapshot.point
            shift = problem.shift(snapshot, previous)
        is_fresh = sampler.coin(problem.probability) and problem.moving
        if is_fresh:
            snapshot = certify(oracle, point, target, step)
            if accept is not None and accept(snapshot):
                return Inner(snapshot, number, True)
            # The reflection still refers to the snapshot before, for one step.
            shift = problem.shift(snapshot, previous)
    found = snapshot if is_fresh else certify(oracle, point, target, step)
    return Inner(found, num_steps, accept is None)
