"""Inclusions, their validation and the counting oracle."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import FiniteSumInclusion, Inclusion, Oracle, fixed_point, solve


def finite_sum(num=5, **changes):
    """F_i(z) = M_i z + c_i with known mean."""
    g = torch.Generator().manual_seed(0)
    m = torch.randn(num, 3, 3, generator=g, dtype=torch.float64)
    m = m @ m.mT
    c = torch.randn(num, 3, generator=g, dtype=torch.float64)

    def components(z, index, weight):
        return torch.einsum("n,nij,j->i", weight, m[index], z) + weight @ c[index]

    settings = {"components": components, "num_components": num, "start": torch.zeros(3).double()}
    return FiniteSumInclusion(**(settings | changes)), m.mean(0), c.mean(0)


def test_finite_sum_full_is_the_mean_and_costs_all_components():
    """Oracle: the mean matrix and vector."""
    problem, m, c = finite_sum()
    oracle = Oracle(problem)
    z = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.allclose(oracle.full(z), m @ z + c, atol=1e-12)
    assert oracle.calls == 5


def test_importance_weights_reproduce_the_mean():
    """Oracle: full enumeration of F_i / (N q_i) weighted with q_i."""
    problem, m, c = finite_sum()
    q = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
    z = torch.tensor([0.3, 0.1, -1.0], dtype=torch.float64)
    total = sum(
        q[i] * problem.components(z, torch.tensor([i]), 1 / (5 * q[i : i + 1])) for i in range(5)
    )
    assert torch.allclose(total, m @ z + c, atol=1e-12)


def test_deterministic_methods_solve_a_finite_sum():
    """Oracle: linear solve with the mean matrix; the calls add up."""
    problem, m, c = finite_sum()
    result = solve(problem, "halpern_restarted", atol=1e-9)
    assert result.converged
    assert torch.allclose(result.value, torch.linalg.solve(m, -c), atol=1e-6)
    # The test for randomness asks one component twice; nothing else samples.
    assert result.component_evals == 2
    assert result.oracle_calls == 5 * result.full_evals + 2


def test_fixed_point_of_a_projection_uses_the_longer_step():
    """Oracle: a projection is 1/2-averaged, so one reflected step of 2 lands on its mirror."""
    start = torch.tensor([3.0], dtype=torch.float64)
    problem = fixed_point(lambda u: u.clamp(max=1.0), start, averagedness=0.5)
    assert problem.lipschitz_bound == 1.0
    assert solve(problem, "halpern", atol=1e-3).value.item() == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["lipschitz_bound", "lipschitz_est"])
def test_refuses_impossible_constants(name, value):
    """Negative, NaN and infinite constants."""
    with pytest.raises(ConfigError, match=name):
        Inclusion(operator=lambda u: u, start=torch.zeros(2), **{name: value})
    with pytest.raises(ConfigError, match=name):
        finite_sum(**{name: value})


def test_refuses_impossible_starts_and_sums():
    """Integer, empty and NaN starts; no components; constants of the wrong length or sign."""
    for start in (torch.zeros(2, dtype=torch.long), torch.zeros(0)):
        with pytest.raises(ShapeError):
            Inclusion(operator=lambda u: u, start=start)
    with pytest.raises(ConfigError):
        Inclusion(operator=lambda u: u, start=torch.tensor([math.nan]))
    with pytest.raises(ConfigError):
        finite_sum(num_components=0)
    with pytest.raises(ShapeError):
        finite_sum(component_lipschitz=torch.ones(4))
    with pytest.raises(ConfigError):
        finite_sum(component_lipschitz=-torch.ones(5))
    with pytest.raises(ConfigError):
        fixed_point(lambda u: u, torch.zeros(2), averagedness=0.0)


def test_operator_of_another_shape_is_refused():
    """Oracle: the message names both shapes."""
    problem = Inclusion(operator=lambda u: u[:1], start=torch.zeros(2))
    with pytest.raises(ShapeError, match=r"\(2,\).*\(1,\)"):
        solve(problem, "halpern")


def test_solve_builds_no_graph():
    """Oracle: the result of a differentiable operator does not require gradients."""
    weight = torch.ones(2, requires_grad=True)
    result = solve(Inclusion(operator=lambda u: weight * u - 1, start=torch.zeros(2)), atol=1e-3)
    assert not result.value.requires_grad
