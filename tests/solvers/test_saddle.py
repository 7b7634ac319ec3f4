"""Bilinear saddle points: operator, weak duality, couplings in every form."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import bilinear_saddle, solve
from solvers.resolvents import L1, Box, ElasticNet, L2Ball, Nonneg, Simplex, SpectralBall
from solvers.saddle import power_iteration

ROUNDING = 1e-10  # float64, entries of order 10
PAIRS = {
    "simplices": (Simplex(), Simplex()),
    "balls": (L2Ball(2.0), L2Ball(0.5)),
    "boxes": (Box(-1.0, 2.0), Box(0.0, 1.5)),
    "penalties": (ElasticNet(0.3, 0.7), ElasticNet(0.0, 2.0)),
    "mixed": (L1(50.0), L2Ball(1.0)),
    "half": (Nonneg(), ElasticNet(0.1, 0.2)),
}


def data(seed=0, rows=4, columns=6):
    """Return a random coupling, cost and offset."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, columns), (columns,), (rows,))
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)


def test_operator_is_the_signed_gradient_of_the_saddle_function():
    """Oracle: automatic differentiation of <c, x> + <y, A x> - <b, y>."""
    a, c, b = data()
    problem = bilinear_saddle(a, cost=c, offset=b)
    x, y = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (6, 4))
    (c @ x + y @ (a @ x) - b @ y).backward()
    first, second = problem.operator((x.detach(), y.detach()))
    assert torch.allclose(first, x.grad, atol=ROUNDING)
    assert torch.allclose(second, -y.grad, atol=ROUNDING)
    assert problem.lipschitz_bound == pytest.approx(float(torch.linalg.svdvals(a)[0]), rel=1e-6)
    assert problem.cocoercive is False


@pytest.mark.parametrize("pair", PAIRS)
def test_weak_duality_holds_and_the_gap_closes_at_the_solution(pair):
    """Oracle: primal_value >= dual_value for all feasible points, with equality at a saddle."""
    a, c, b = data()
    primal, dual = PAIRS[pair]
    problem = bilinear_saddle(a, cost=c, offset=b, primal=primal, dual=dual, constant=3.0)
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = primal(3 * torch.randn(6, generator=g, dtype=torch.float64), 1.0)
        y = dual(3 * torch.randn(4, generator=g, dtype=torch.float64), 1.0)
        saddle = 3 + float(c @ x + y @ (a @ x) - b @ y) + primal.value(x) - dual.value(y)
        assert problem.primal_value(x) >= saddle - ROUNDING
        assert problem.dual_value(y) <= saddle + ROUNDING
    result = solve(problem, "pdhg", atol=1e-9)
    assert result.converged, result.message
    assert result.verify(problem) == pytest.approx(result.residual, rel=1e-6, abs=1e-14)
    # Over an unbounded domain the gap is infinite at any point that is the least bit infeasible.
    if pair != "half":
        assert -ROUNDING <= problem.duality_gap(result.value) <= 1e-7
    if result.gap_bound is not None:
        assert problem.duality_gap(result.value) <= result.gap_bound + ROUNDING


def test_all_forms_of_a_coupling_agree():
    """Oracle: the dense matrix; the sparse one and the pair of products give the same operator."""
    a, c, b = data()
    dense = bilinear_saddle(a, cost=c, offset=b, primal=Box(-1.0, 1.0), dual=L2Ball(1.0))
    z = (torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    for coupling in (a.to_sparse_coo(), (lambda x: a @ x, lambda y: y @ a)):
        other = bilinear_saddle(coupling, cost=c, offset=b, primal=Box(-1.0, 1.0), dual=L2Ball(1.0))
        for mine, theirs in zip(dense.operator(z), other.operator(z), strict=True):
            assert torch.allclose(mine, theirs, atol=ROUNDING)
        assert other.lipschitz_bound is None
        assert other.lipschitz_est == pytest.approx(dense.lipschitz_bound, rel=0.05)
        assert solve(other, "pdhg", atol=1e-8).converged


def test_power_iteration_approaches_the_norm_from_below():
    """Oracle: the largest singular value; 0 for the zero map."""
    for seed in range(5):
        a = data(seed, 30, 20)[0]
        size = power_iteration(lambda x, a=a: a @ x, lambda y, a=a: y @ a, a[0], steps=200)
        norm = float(torch.linalg.svdvals(a)[0])
        assert 0.99 * norm <= size <= norm * (1 + 1e-12)
    assert power_iteration(torch.zeros_like, torch.zeros_like, torch.ones(3)) == 0


def test_finite_sum_has_the_same_mean_and_solution():
    """Oracle: the operator of the saddle point itself, and the value of the deterministic run."""
    a, c, b = data()
    problem = bilinear_saddle(a, cost=c, offset=b, primal=Simplex(), dual=Box(0.0, 1.0))
    total = problem.finite_sum()
    z = (torch.randn(6, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    assert torch.allclose(total.full(torch.cat(z)), torch.cat(problem.operator(z)), atol=ROUNDING)
    assert total.mean_square_lipschitz == pytest.approx(float(a.norm()))
    deterministic = solve(problem, "pdhg", atol=1e-9)
    sampled = solve(total, "eag", atol=1e-4)
    assert sampled.converged
    x, y = sampled.value.split((6, 4))
    gap = problem.duality_gap((x, y))
    assert 0 <= gap + ROUNDING <= 1e-3
    assert problem.primal_value(x) == pytest.approx(
        problem.primal_value(deterministic.value[0]), abs=1e-3
    )
    with pytest.raises(ConfigError, match="dense matrix"):
        bilinear_saddle((lambda x: x, lambda y: y), cost=c, offset=c).finite_sum()


def test_points_may_be_matrices():
    """Oracle: the distance to a spectral ball, by clipping singular values."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(5, 3, generator=g, dtype=torch.float64)
    # min over |X| <= 1 of |X - B|_F is the saddle value over |Y|_F <= 1 of <Y, X - B>.
    problem = bilinear_saddle(
        (lambda x: x, lambda y: y), offset=target, cost=0 * target,
        primal=SpectralBall(1.0), dual=L2Ball(1.0), lipschitz_bound=1.0,
    )  # fmt: skip
    result = solve(problem, "pdhg", atol=1e-9)
    assert result.converged
    assert result.value[0].shape == (5, 3)
    truth = float((torch.linalg.svdvals(target) - 1).clamp_min(0).norm())
    assert problem.primal_value(result.value[0]) == pytest.approx(truth, abs=1e-7)
    assert problem.dual_value(result.value[1]) == pytest.approx(truth, abs=1e-7)


def test_basis_pursuit_matches_its_linear_program():
    """Oracle: scipy's simplex method on min |x|_1 subject to A x = b, split into two parts."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    a, _, _ = data(3, 6, 12)
    b = a @ torch.eye(12, dtype=torch.float64)[:, [2, 7]] @ torch.tensor([1.5, -2.0]).double()
    result = solve(bilinear_saddle(a, offset=b, primal=L1(1.0)), "pdhg", atol=1e-8)
    assert result.converged
    split = torch.cat((a, -a), 1)
    truth = scipy_optimize.linprog([1.0] * 24, A_eq=split.numpy(), b_eq=b.numpy()).fun
    assert float(result.value[0].abs().sum()) == pytest.approx(truth, abs=1e-6)


def test_impossible_data_are_refused():
    """Each mistake is named in one line."""
    a, c, b = data()
    with pytest.raises(ShapeError, match=r"cost: expected shape \(6,\)"):
        bilinear_saddle(a, cost=b)
    with pytest.raises(ShapeError, match="offset"):
        bilinear_saddle(a, offset=c)
    with pytest.raises(ShapeError, match="coupling"):
        bilinear_saddle(c)
    with pytest.raises(ShapeError, match="coupling"):
        bilinear_saddle(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="coupling: expected finite"):
        bilinear_saddle(a * math.nan)
    with pytest.raises(ConfigError, match="offset: expected finite"):
        bilinear_saddle(a, offset=b / 0)
    with pytest.raises(ConfigError, match="cost: give it"):
        bilinear_saddle((lambda x: x, lambda y: y))
