"""Where the Lipschitz constant comes from, and how evaluations correct it."""

import pytest
import torch

from solvers import Inclusion, Oracle, Status, solve
from solvers.lipschitz import (
    backtracked,
    cocoercivity_holds,
    first_lipschitz,
    power_lipschitz,
    probed_lipschitz,
    slope_holds,
)

POWER_ROOM = 0.03  # margin of 2 % and the tolerance of the iteration


def affine(seed, size=12, dtype=torch.float64, **fields):
    """M z + c with a monotone M that is neither symmetric nor skew."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(size, size, generator=g, dtype=torch.float64)
    m = (m @ m.mT / size + (m - m.mT)).to(dtype)
    c = torch.randn(size, generator=g, dtype=torch.float64).to(dtype)
    start = torch.randn(size, generator=g, dtype=torch.float64).to(dtype)
    return Inclusion(operator=lambda z: m @ z + c, start=start, **fields), m


@pytest.mark.parametrize("seed", range(5))
def test_power_iteration_finds_the_spectral_norm(seed):
    """Oracle: the largest singular value; also through the tuples that the user sees."""
    problem, m = affine(seed)
    true = float(torch.linalg.matrix_norm(m, 2))
    found = power_lipschitz(Oracle(problem), problem.start)
    assert true * (1 - POWER_ROOM) <= found <= true * (1 + POWER_ROOM)
    halves = Inclusion(
        operator=lambda z: tuple(problem.operator(torch.cat(z)).split((5, 7))),
        start=problem.start.split((5, 7)),
    )
    assert power_lipschitz(Oracle(halves), problem.start) == pytest.approx(found)


def test_power_iteration_gives_up_where_nothing_can_be_differentiated():
    """A detached operator and a constant one; the probe then takes over."""
    start = torch.ones(3, dtype=torch.float64)
    detached = Inclusion(operator=lambda z: 3 * z.detach(), start=start, linear=True)
    oracle = Oracle(detached)
    assert power_lipschitz(oracle, start) is None
    assert first_lipschitz(oracle, start, 3 * start) == pytest.approx(3.0, rel=1e-6)
    constant = Inclusion(operator=torch.ones_like, start=start)
    assert probed_lipschitz(Oracle(constant), start, start) == 1.0


def test_order_of_the_sources():
    """Oracle: a bound wins over a warm start, that over a guess, that over measurements."""
    problem, m = affine(0)
    value = problem.operator(problem.start)
    warm = solve(problem, "eag", max_iterations=3).state
    constants = {
        "given": (Oracle(affine(0, lipschitz_bound=7.0, lipschitz_est=5.0)[0], warm), 7.0),
        "warm": (Oracle(affine(0, lipschitz_est=5.0)[0], warm), warm.lipschitz),
        "guess": (Oracle(affine(0, lipschitz_est=5.0)[0]), 5.0),
        "zero": (Oracle(affine(0, lipschitz_bound=0.0)[0]), 1.0),
    }
    for oracle, expected in constants.values():
        assert first_lipschitz(oracle, problem.start, value) == expected
    raised = constants["given"][0]
    raised.lipschitz_floor = 9.0
    assert first_lipschitz(raised, problem.start, value) == 9.0
    assert probed_lipschitz(Oracle(problem), problem.start, value) <= float(
        torch.linalg.matrix_norm(m, 2)
    ) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"lipschitz_bound": 40.0}, "given"),
        ({"linear": True}, "power"),
        ({}, "backtracked"),
        ({"lipschitz_est": 3.0}, "backtracked"),
        ({"lipschitz_bound": 0.5}, "backtracked"),
    ],
)
def test_result_names_the_source(fields, source):
    """Oracle: how the constant was given; a bound that is contradicted does not remain one."""
    problem, _ = affine(1, **fields)
    result = solve(problem, "feg", atol=1e-3)
    assert result.converged
    assert result.lipschitz_source == source


def test_slopes_are_judged_by_their_definition():
    """Oracle: linear maps whose constants are known; -z is not monotone."""
    old, new = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0]).double()
    maps = {
        "double": (2 * torch.eye(2).double(), (2.0, 2.0)),
        "rotation": (torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), (1.0, None)),
    }
    for matrix, (slope, cocoercive) in maps.values():
        pair = (old, matrix @ old, new, matrix @ new)
        assert slope_holds(*pair, slope * 1.001) == (True, None)
        assert slope_holds(*pair, slope * 0.999) == (False, None)
        if cocoercive is None:
            assert cocoercivity_holds(*pair, 10.0) == (False, None)
            assert cocoercivity_holds(*pair, 1e5) == (False, Status.ASSUMPTION_VIOLATED)
        else:
            assert cocoercivity_holds(*pair, cocoercive * 1.001) == (True, None)
            assert cocoercivity_holds(*pair, cocoercive * 0.999) == (False, None)
    for judge in (slope_holds, cocoercivity_holds):
        assert judge(old, old, new, -new, 5.0) == (False, Status.NOT_MONOTONE)
        assert judge(old, old, new, new * torch.nan, 5.0) == (False, None)


def test_backtracking_doubles_until_the_evaluation_agrees():
    """Oracle: powers of two from 1 to the first above the true constant 5; attempts are counted."""
    start = torch.ones(2, dtype=torch.float64)
    oracle = Oracle(Inclusion(operator=lambda z: 5 * z, start=start))
    value = 5 * start
    trial = backtracked(oracle, start, value, 1.0, lambda c: start - value / c, slope_holds)
    assert trial.lipschitz == 8.0
    assert torch.equal(trial.value, 5 * trial.point)
    assert oracle.full_evals == 4
    fragile = Oracle(Inclusion(operator=lambda z: z * torch.nan, start=start))
    nothing = backtracked(fragile, start, value, 1.0, lambda c: start / c, slope_holds)
    assert nothing is Status.NONFINITE
