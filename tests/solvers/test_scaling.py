"""Affine-hull centring and diagonal preconditioning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from solvers import bilinear_saddle, center, matrix_game, solve
from solvers.games import policeman_burglar
from solvers.resolvents import Box, Simplex
from solvers.scaling import precondition

EXACT = 1e-12
PRINTED = 5e-4  # relative rounding of the figures that the specification prints


def payoff(size=200):
    """Return the policeman and burglar game with the draws of the paper's scripts."""
    return policeman_burglar(torch.tensor(np.abs(np.random.RandomState(1).randn(size))))


def strategies(rows, columns, seed=0):
    """Return random mixed strategies ``(x, y)``."""
    g = torch.Generator().manual_seed(seed)
    raw = (torch.rand(n, generator=g, dtype=torch.float64) for n in (columns, rows))
    return tuple(v / v.sum() for v in raw)


def test_policeman_burglar_has_the_constants_of_the_specification():
    """Oracle: the constants 180.9, 181.5 and, centred, 3.71, 15.7 of spec 2.10."""
    raw, centered = matrix_game(payoff(), centered=False), matrix_game(payoff())
    assert raw.lipschitz_bound == pytest.approx(180.874, rel=PRINTED)
    assert float(raw.matrix.norm()) == pytest.approx(181.544, rel=PRINTED)
    assert centered.lipschitz_bound == pytest.approx(3.7090, rel=PRINTED)
    assert float(centered.matrix.norm()) == pytest.approx(15.671, rel=PRINTED)


def test_centring_changes_neither_steps_nor_values():
    """Oracle: resolvent steps, saddle values and gap of the raw game, to rounding."""
    g = torch.Generator().manual_seed(1)
    a = 10 + torch.randn(7, 5, generator=g, dtype=torch.float64)
    raw, centered = matrix_game(a, centered=False), matrix_game(a)
    assert centered.lipschitz_bound < raw.lipschitz_bound / 5
    for seed in range(10):
        z = strategies(7, 5, seed)
        for step in (0.1, 1.0):
            moved = [
                problem.resolvent(
                    tuple(u - step * f for u, f in zip(z, problem.operator(z), strict=True)), step
                )
                for problem in (raw, centered)
            ]
            for one, other in zip(*moved, strict=True):
                assert torch.allclose(one, other, atol=EXACT * 100)
        assert raw.primal_value(z[0]) == pytest.approx(centered.primal_value(z[0]), abs=1e-11)
        assert raw.dual_value(z[1]) == pytest.approx(centered.dual_value(z[1]), abs=1e-11)


def test_certificate_of_the_centered_game_carries_over_to_the_raw_game():
    """Oracle: Result.verify on the raw game, of the normal moved by the difference of both F."""
    g = torch.Generator().manual_seed(3)
    a = 10 + torch.randn(12, 15, generator=g, dtype=torch.float64)
    raw, centered = matrix_game(a, centered=False), matrix_game(a)
    result = solve(centered, "pdhg", atol=1e-8)
    assert result.converged
    fields = zip(
        result.normal, centered.operator(result.value), raw.operator(result.value), strict=True
    )
    moved = replace(result, normal=tuple(n + one - other for n, one, other in fields))
    assert moved.verify(raw) == pytest.approx(result.verify(centered), abs=1e-11)


def test_centring_takes_products_and_other_sets():
    """Oracle: the dense matrix for the pair; a fixed variable leaves the coupling."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(4, 6, generator=g, dtype=torch.float64)
    start = strategies(4, 6)
    dense = center(bilinear_saddle(a, primal=Simplex(), dual=Simplex(), start=start))
    pair = bilinear_saddle(
        (lambda x: a @ x, lambda y: y @ a), primal=Simplex(), dual=Simplex(), start=start
    )
    products = center(pair)
    for one, other in zip(dense.operator(start), products.operator(start), strict=True):
        assert torch.allclose(one, other, atol=EXACT)
    low = torch.tensor([0.5, -1.0, -1, -1, -1, 2.0], dtype=torch.float64)
    high = torch.tensor([0.5, 1.0, 1, 1, 1, 2.0], dtype=torch.float64)
    boxed = bilinear_saddle(a, primal=Box(low, high), dual=Box(-1.0, 1.0))
    fixed = center(boxed)
    assert float(fixed.matrix[:, [0, 5]].abs().max()) == 0
    assert torch.equal(fixed.matrix[:, 1:5], a[:, 1:5])
    x, y = low, torch.rand(4, dtype=torch.float64)
    assert boxed.primal_value(x) == pytest.approx(fixed.primal_value(x))
    assert boxed.dual_value(y) == pytest.approx(fixed.dual_value(y))


def test_centring_leaves_an_unconstrained_problem_alone():
    """Oracle: the same operator."""
    a = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    problem = bilinear_saddle(a, cost=a[0], offset=a[:, 0])
    z = (torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    for one, other in zip(problem.operator(z), center(problem).operator(z), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(5))
def test_preconditioned_matrices_have_norm_at_most_one(seed):
    """Oracle: the lemma of Pock and Chambolle for alpha = 1, on rows and columns of all scales."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(12, 20, generator=g, dtype=torch.float64)
    a *= 10.0 ** torch.randint(-6, 7, (12, 1), generator=g)
    a *= 10.0 ** torch.randint(-6, 7, (20,), generator=g)
    a *= torch.rand(12, 20, generator=g) < 0.5
    a[3], a[:, 5] = 0.0, 0.0
    row, column, norm = precondition(a)
    assert row[3] == 1
    assert column[5] == 1
    assert bool((row > 0).all() and (column > 0).all())
    scaled = row[:, None] * a * column
    assert float(torch.linalg.svdvals(scaled)[0]) <= 1 + 1e-12
    assert norm == pytest.approx(float(torch.linalg.svdvals(scaled)[0]), rel=1e-6)
    for mine, dense in zip(precondition(a.to_sparse_coo())[:2], (row, column), strict=True):
        assert torch.allclose(mine, dense, rtol=1e-12)
    sums = scaled.abs().sum(1)[torch.arange(12) != 3]
    assert float(sums.max() / sums.min()) < 100


def test_preconditioning_survives_matrices_without_rows():
    """Oracle: factors of 1."""
    row, column, norm = precondition(torch.zeros(0, 3))
    assert row.shape == (0,)
    assert torch.equal(column, torch.ones(3))
    assert norm == 1
