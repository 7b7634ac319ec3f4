"""Backward elimination and forward selection against one-at-a-time oracles."""

import pytest
import torch

from compress.scoring.elimination import eliminate, regular_cholesky, select
from compress.targets import Problem, block_indices

EXACT = 1e-8
"""Relative; float64 linear algebra on well-conditioned systems."""


def refit_error(problem: Problem, components: list[int]) -> float:
    """Error of ordinary least squares on some components (oracle: lstsq on rows)."""
    rows = torch.linalg.cholesky(problem.gram_II).T
    target = rows @ problem.weight_IO
    if not components:
        return float(target.square().sum())
    kept = block_indices(torch.tensor(components), problem.unit)
    solution = torch.linalg.lstsq(rows[:, kept], target).solution
    return float((target - rows[:, kept] @ solution).square().sum())


def doubled(problem: Problem, ridge: float) -> Problem:
    """Every feature twice, at different scales and with different weights."""
    size = len(problem.weight_IO)
    scale = torch.linspace(0.5, 2, size, dtype=torch.float64)
    copies = torch.cat([torch.eye(size, dtype=torch.float64), torch.diag(scale)])
    return Problem(
        gram_II=copies @ problem.gram_II @ copies.T,
        weight_IO=torch.cat([problem.weight_IO, problem.weight_IO.flip(0)]),
        unit=problem.unit,
        ridge=ridge,
    )


@pytest.mark.parametrize("kind", ["free", "low_rank", "clusters"])
@pytest.mark.parametrize("unit", [1, 2, 4])
def test_selection_takes_the_best_addition_every_time(make_problem, kind, unit):
    """Oracle: all refits with one more component, at each of the first eight steps."""
    problem, _ = make_problem(kind, seed=1, unit=unit)
    order = select(problem).tolist()
    assert sorted(order) == list(range(problem.components))
    for step in range(min(8, problem.components)):
        errors = {c: refit_error(problem, [*order[:step], c]) for c in order[step:]}
        assert errors[order[step]] <= min(errors.values()) + EXACT * problem.energy


@pytest.mark.parametrize("unit", [1, 2])
def test_selection_does_not_depend_on_the_length_of_a_round(make_problem, monkeypatch, unit):
    """Oracle: rounds of one step, where nothing is a difference of norms."""
    problem, _ = make_problem("low_rank", inputs=96, outputs=24, rows=4096, unit=unit)
    order = select(problem)
    monkeypatch.setattr("compress.scoring.elimination.MAX_ROUND", 1)
    assert torch.equal(select(problem), order)


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_selection_never_takes_both_of_two_duplicates(make_problem, unit, ridge):
    """One of each pair carries everything: the second ones come last."""
    problem, _ = make_problem("free", inputs=16, unit=unit)
    twice = doubled(problem, ridge)
    count = problem.components
    first = select(twice)[:count]
    assert sorted((first % count).tolist()) == list(range(count))


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_costs_add_up_to_the_error_of_the_rest(make_problem, unit):
    """Oracle: the refitted error of what is left, at every number removed."""
    problem, _ = make_problem("low_rank", seed=3, unit=unit)
    order, costs = eliminate(problem, 0)
    left = set(range(problem.components))
    for component, total in zip(order.tolist(), costs.cumsum(0).tolist(), strict=True):
        left.remove(component)
        expected = refit_error(problem, sorted(left))
        assert total == pytest.approx(expected, rel=EXACT, abs=EXACT * problem.energy)


@pytest.mark.parametrize("keep", [0, 7, 16])
def test_elimination_stops_where_it_is_told(make_problem, keep):
    """Oracle: the beginning of the complete order (rounds of one component at this size)."""
    problem, _ = make_problem("clusters", unit=2, ridge=1e-6)
    order, costs = eliminate(problem, keep)
    assert len(order) == len(costs) == 16 - keep
    assert torch.equal(order, eliminate(problem, 0)[0][: 16 - keep])


@pytest.mark.parametrize("order_of", [lambda p: eliminate(p, 0)[0], select], ids=["obs", "greedy"])
def test_inputs_are_left_as_they_were(make_problem, order_of):
    """Updates in place happen on copies."""
    problem, _ = make_problem("low_rank")
    gram, weight = problem.gram_II.clone(), problem.weight_IO.clone()
    order_of(problem)
    assert torch.equal(problem.gram_II, gram)
    assert torch.equal(problem.weight_IO, weight)


def test_a_singular_gram_is_factored_with_the_least_ridge_that_works():
    """Rank one: the ridge that was added stays far below the entries."""
    vector = torch.arange(1.0, 9.0, dtype=torch.float64)
    gram = torch.outer(vector, vector)
    factor = regular_cholesky(gram, 0.0)
    torch.testing.assert_close(factor @ factor.T, gram, rtol=1e-9, atol=1e-9)
