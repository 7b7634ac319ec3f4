"""The inner solver of Algorithm 2 and the error it proves, against direct linear solves."""

import math

import pytest
import torch

from solvers import FiniteSumInclusion, Oracle
from solvers.sampled import certified_start
from solvers.sampling import Sampler, uniform_law
from solvers.structure import norm
from solvers.vr_forb import Proximal, batch_lipschitz, vr_forb

F64 = torch.float64
SIZE, NUM = 6, 32
ROUNDING = 1e-10
CONVERGED = 1e-8


def skew_sum(resolvent=None):
    """F_i(z) = M_i z + c_i with skew M_i: monotone, never cocoercive."""
    g = torch.Generator().manual_seed(0)
    m = torch.randn(NUM, SIZE, SIZE, generator=g, dtype=F64)
    m = m - m.mT + 0.5 * (m - m.mT).mean(0)
    c = torch.randn(NUM, SIZE, generator=g, dtype=F64)
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: weight @ (m[index] @ z + c[index]),
        num_components=NUM,
        start=torch.randn(SIZE, generator=g, dtype=F64),
        resolvent=resolvent,
        lipschitz_bound=float(torch.linalg.matrix_norm(m.mean(0), 2)),
        mean_square_lipschitz=math.sqrt(float(torch.linalg.eigvalsh((m.mT @ m).mean(0))[-1])),
    )
    return problem, m.mean(0), c.mean(0)


def inner(problem, *, implicit=False, batch=1, moving=True):
    """Return the inner problem at the start and the warm point."""
    oracle = Oracle(problem)
    warm = certified_start(oracle, problem.start)
    constant = batch_lipschitz(problem.lipschitz_bound, problem.mean_square_lipschitz, batch)
    eta, p = math.sqrt(NUM / batch) / constant, batch / NUM
    whole = eta * constant + (0 if implicit else 1)
    proximal = Proximal(
        center=torch.linspace(-1, 1, SIZE, dtype=F64),
        eta=eta,
        tau=math.sqrt(p * (1 - p)) / whole,
        probability=p,
        full_lipschitz=1 + eta * problem.lipschitz_bound,
        implicit=implicit,
        moving=moving,
    )
    sampler = Sampler((uniform_law(NUM),), batch, seed=0, like=problem.start)
    return oracle, sampler, proximal, warm


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_reaches_the_resolvent(implicit, batch):
    """Oracle: the linear system (I + eta M) v = center - eta c."""
    problem, m, c = skew_sum()
    oracle, sampler, proximal, warm = inner(problem, implicit=implicit, batch=batch)
    steps = 80 * NUM // batch
    found = vr_forb(oracle, sampler, proximal, warm, steps).found
    system = torch.eye(SIZE, dtype=F64) + proximal.eta * m
    exact = torch.linalg.solve(system, proximal.center - proximal.eta * c)
    assert norm(found.point - exact) <= CONVERGED * norm(exact)
    assert oracle.component_evals == 2 * batch * steps


@pytest.mark.parametrize("implicit", [False, True])
def test_the_error_bound_holds_at_every_snapshot(implicit):
    """Oracle: the distance to the direct solution; the bound is also not vacuous."""
    problem, m, c = skew_sum()
    oracle, sampler, proximal, warm = inner(problem, implicit=implicit)
    system = torch.eye(SIZE, dtype=F64) + proximal.eta * m
    exact = torch.linalg.solve(system, proximal.center - proximal.eta * c)
    ratios = []

    def watch(found):
        error, bound = norm(found.point - exact), proximal.error_bound(oracle, found)
        assert error <= bound * (1 + ROUNDING) + ROUNDING
        ratios.append(bound / error)
        return len(ratios) == 20

    assert vr_forb(oracle, sampler, proximal, warm, 10**5, watch).accepted
    assert min(ratios) < proximal.full_lipschitz


def test_the_error_bound_holds_with_a_resolvent():
    """Oracle: the resolvent over a box, iterated to rounding by the deterministic fixed point."""
    problem, m, c = skew_sum(lambda z, step: z.clamp(-0.3, 0.3))
    oracle, sampler, proximal, warm = inner(problem)
    exact, slope = warm.point, proximal.eta * m + torch.eye(SIZE, dtype=F64)
    tau = 1 / proximal.full_lipschitz**2
    for _ in range(20_000):
        value = slope @ exact + proximal.eta * c - proximal.center
        exact = (exact - tau * value).clamp(-0.3, 0.3)
    count = 0

    def watch(found):
        nonlocal count
        count += 1
        assert norm(found.point - exact) <= proximal.error_bound(oracle, found) + CONVERGED
        return count == 20

    found = vr_forb(oracle, sampler, proximal, warm, 10**5, watch).found
    assert found.normal is not None
    # An element of the normal cone of a box: outward at the faces, zero inside.
    inside = found.point.abs() < 0.3 - ROUNDING
    assert bool((found.normal[inside].abs() < ROUNDING).all())
    assert bool((found.normal * found.point.sign() >= -ROUNDING)[~inside].all())


def test_a_snapshot_that_never_moves_does_not_converge_as_well():
    """Oracle: the defect of the published scripts (spec 3.3), same draws with and without it."""
    problem, m, c = skew_sum()
    errors = []
    for moving in (True, False):
        oracle, sampler, proximal, warm = inner(problem, moving=moving)
        system = torch.eye(SIZE, dtype=F64) + proximal.eta * m
        exact = torch.linalg.solve(system, proximal.center - proximal.eta * c)
        found = vr_forb(oracle, sampler, proximal, warm, 60 * NUM).found
        errors.append(norm(found.point - exact))
    assert errors[0] < 1e-3 * errors[1]


def test_batch_constant_is_the_second_moment_of_an_average():
    """Oracle: enumeration of all pairs drawn with replacement; one component is L_Q itself."""
    problem, m, _ = skew_sum()
    mean, square = problem.lipschitz_bound, problem.mean_square_lipschitz
    d = torch.randn(SIZE, generator=torch.Generator().manual_seed(2), dtype=F64)
    images = m @ d
    pairs = (images[:, None] + images[None]) / 2
    second = float(pairs.square().sum(-1).mean())
    assert second <= batch_lipschitz(mean, square, 2) ** 2 * float(d @ d) * (1 + ROUNDING)
    assert batch_lipschitz(mean, square, 1) == square
    assert batch_lipschitz(mean, square, 8) <= math.sqrt(mean**2 + square**2 / 8)
