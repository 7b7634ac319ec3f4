"""The oracle: what is counted, and what protects a run from careless operators."""

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import FiniteSumInclusion, Inclusion, Oracle, solve
from solvers.sampling import Draw


class Counter:
    """An operator that counts its own calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        """Evaluate and count."""
        self.calls += 1
        return self.function(*arguments)


def shifted_sum(num=6):
    """F_i(z) = z - c_i."""
    c = torch.arange(num, dtype=torch.float64)[:, None].expand(num, 2)
    return FiniteSumInclusion(
        components=lambda z, index, weight: weight.sum() * z - weight @ c[index],
        num_components=num,
        start=torch.zeros(2, dtype=torch.float64),
        lipschitz_bound=1.0,
    ), c


def test_evaluations_are_counted_apart():
    """Oracle: the closed form, and the numbers asked for."""
    problem, c = shifted_sum()
    oracle = Oracle(problem)
    z, old = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    draw = Draw(torch.tensor([1, 3, 3]), torch.tensor([0.5, 0.25, 0.25]).double())
    assert torch.allclose(oracle.full(z), z - c.mean(0))
    assert torch.allclose(oracle.batch(z, draw), z - (0.5 * c[1] + 0.5 * c[3]))
    assert torch.allclose(oracle.difference(z, old, draw), z - old)
    assert (oracle.full_evals, oracle.component_evals) == (1, 3 + 6)
    assert oracle.calls == 6 * 1 + 9


def test_one_operator_cannot_be_sampled():
    """A draw from a problem without components says what is missing."""
    oracle = Oracle(Inclusion(operator=lambda u: u, start=torch.zeros(2)))
    with pytest.raises(ConfigError, match="nothing to sample"):
        oracle.batch(torch.zeros(2), Draw(torch.tensor([0]), torch.ones(1)))


@pytest.mark.parametrize("method", ["halpern_restarted", "eag", "forb", "halpern_resolvent"])
def test_calls_equal_what_the_operator_saw(method):
    """Oracle: a counting wrapper around the operator."""
    counter = Counter(lambda u: u - 3)
    problem = Inclusion(
        operator=counter,
        start=torch.zeros(2, dtype=torch.float64),
        resolvent=lambda z, step: z.clamp(0.0, 1.0),
    )
    result = solve(problem, method, atol=1e-6)
    assert result.converged
    assert result.full_evals == result.oracle_calls == counter.calls


def test_precise_evaluates_in_float64_where_the_operator_can():
    """Oracle: dtypes seen by the operator; one whose weights are float32 refuses float64."""
    weight = torch.eye(2)
    seen = []

    def by_entry(u):
        seen.append(u.dtype)
        return u * 2

    point = torch.ones(2)
    oracle = Oracle(Inclusion(operator=by_entry, start=point))
    assert oracle.precise(point).dtype == torch.float64
    assert seen == [torch.float64]
    oracle = Oracle(Inclusion(operator=lambda u: weight @ u, start=point))
    assert oracle.precise(point).dtype == torch.float32
    assert oracle.full_evals == 1


def test_reused_buffers_and_in_place_resolvents_do_no_harm():
    """Oracle: the same problem with functions that return new tensors, step for step."""
    buffer = torch.zeros(4, dtype=torch.float64)
    h = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
    start = torch.zeros(4, dtype=torch.float64)

    def reusing(u):
        return torch.mul(h, u - 1, out=buffer)

    clean = Inclusion(
        operator=lambda u: h * (u - 1), start=start, resolvent=lambda z, s: z.clamp(0.0, 0.7)
    )
    careless = Inclusion(operator=reusing, start=start, resolvent=lambda z, s: z.clamp_(0.0, 0.7))
    for method in ("halpern_restarted", "eag", "forb"):
        expected, result = (solve(p, method, atol=1e-8) for p in (clean, careless))
        assert result.converged
        assert torch.equal(result.value, expected.value)
        assert result.trace == expected.trace
        assert result.verify(clean) == pytest.approx(result.residual, abs=1e-12)


def test_operator_that_overwrites_its_argument_is_refused():
    """Oracle: the reason is named, and the start is not what the operator left."""
    problem = Inclusion(operator=lambda u: u.sub_(1), start=torch.zeros(2))
    with pytest.raises(ConfigError, match="overwrites its argument"):
        solve(problem, "halpern")


@pytest.mark.parametrize("what", ["operator", "resolvent"])
def test_functions_of_another_structure_are_refused(what):
    """Oracle: the message names the function and both shapes."""
    functions = {"operator": lambda u: u, "resolvent": lambda z, step: z}
    functions[what] = lambda *arguments: torch.zeros(3)
    problem = Inclusion(start=torch.zeros(2), **functions)
    with pytest.raises(ShapeError, match=rf"{what}.*\(2,\).*\(3,\)"):
        solve(problem, "halpern")


@pytest.mark.parametrize("method", ["halpern", "eag"])
def test_resolvent_that_is_not_finite_is_refused(method):
    """Oracle: it is the resolvent that is blamed, and no iteration is wasted on it."""
    problem = Inclusion(
        operator=lambda u: u, start=torch.ones(2), resolvent=lambda z, step: z / 0 * 0
    )
    with pytest.raises(ConfigError, match="resolvent: its value"):
        solve(problem, method, max_iterations=100)
