"""Finite sums: constants and laws against enumeration, contradictions, bilinear couplings."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers import FiniteSumInclusion, Oracle, bilinear_sum
from solvers.sampling import Draw, uniform_law

EXACT = 1e-12
ROUNDING = 1e-9
F64 = torch.float64


def linear_sum(num=6, size=3, seed=0, **changes):
    """F_i(z) = M_i z + c_i with symmetric positive definite M_i of very different norms."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(num, size, size, generator=g, dtype=F64)
    m = m @ m.mT * torch.logspace(-1, 1, num, dtype=F64)[:, None, None]
    c = torch.randn(num, size, generator=g, dtype=F64)

    def components(z, index, weight):
        return weight @ (m[index] @ z + c[index])

    settings = {
        "components": components,
        "num_components": num,
        "start": torch.zeros(size, dtype=F64),
        "component_lipschitz": torch.linalg.matrix_norm(m, 2),
    }
    return FiniteSumInclusion(**(settings | changes)), m, c


@pytest.mark.parametrize("sampling", ["uniform", "importance", "auto"])
def test_enumeration_of_a_law_gives_the_mean(sampling):
    """Oracle: sum_i q_i F_i(z) / (N q_i) over all components is F(z)."""
    problem, m, c = linear_sum()
    (law,) = problem.sampling_laws(sampling)
    z = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    total = sum(
        law[i] * problem.components(z, torch.tensor([i]), 1 / (6 * law[i : i + 1]))
        for i in range(6)
    )
    assert torch.allclose(total, m.mean(0) @ z + c.mean(0), atol=EXACT, rtol=EXACT)
    assert torch.allclose(problem.full(z), total, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_mean_square_constant_bounds_every_sampled_ratio(sampling):
    """Oracle: E |F_q(u) - F_q(v)|^2 / |u - v|^2 by enumeration, its supremum an eigenvalue."""
    problem, m, _ = linear_sum()
    (law,) = problem.sampling_laws(sampling)
    scaled = m / (6 * law[:, None, None])
    second_moment = (law[:, None, None] * (scaled.mT @ scaled)).sum(0)
    supremum = math.sqrt(float(torch.linalg.eigvalsh(second_moment)[-1]))
    bound = problem.mean_square_bound(sampling)
    assert supremum <= bound * (1 + ROUNDING)
    norms = torch.linalg.matrix_norm(m, 2)
    formula = norms.mean() if sampling == "importance" else norms.square().mean().sqrt()
    assert bound == pytest.approx(float(formula), rel=ROUNDING)


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_average_cocoercivity_holds_on_random_pairs(sampling):
    """Oracle: E |F_q(u) - F_q(v)|^2 <= L <F(u) - F(v), u - v> by enumeration of 200 pairs."""
    problem, m, _ = linear_sum()
    (law,) = problem.sampling_laws(sampling)
    bound = problem.average_cocoercivity(sampling)
    norms = torch.linalg.matrix_norm(m, 2)
    formula = norms.mean() if sampling == "importance" else norms.max()
    assert bound == pytest.approx(float(formula), rel=ROUNDING)
    for d in torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=F64):
        square = sum(law[i] * (m[i] @ d / (6 * law[i])).square().sum() for i in range(6))
        assert float(square) <= bound * float(d @ m.mean(0) @ d) * (1 + ROUNDING)


def test_the_smallest_proved_constant_counts():
    """Oracle: the minimum of what was given and what the components prove."""
    problem, m, _ = linear_sum(mean_square_lipschitz=1e6)
    norms = torch.linalg.matrix_norm(m, 2)
    assert problem.mean_square_bound() == pytest.approx(float(norms.mean()))
    exact = math.sqrt(float(torch.linalg.eigvalsh((m.mT @ m).mean(0))[-1]))
    given, _, _ = linear_sum(component_lipschitz=None, mean_square_lipschitz=exact)
    assert given.mean_square_bound() == exact
    assert given.mean_square_bound("uniform") is None
    assert given.average_cocoercivity() is None


def test_contradicting_constants_are_named():
    """Oracle: L_F <= L_Q always holds, so a larger L_F is reported with both values."""
    with pytest.warns(UserWarning, match="lipschitz_bound=50 exceeds .* 2 of the components"):
        linear_sum(component_lipschitz=None, lipschitz_bound=50.0, mean_square_lipschitz=2.0)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mean_square_lipschitz": -1.0}, ConfigError),
        ({"mean_square_lipschitz": math.nan}, ConfigError),
        ({"laws": (torch.full((6,), 0.5),)}, ConfigError),
        ({"laws": (torch.tensor([0.5, 0.5, 0, 0, 0, 0]),)}, ConfigError),
        ({"laws": (uniform_law(5),)}, ShapeError),
        ({"laws": ()}, ShapeError),
    ],
)
def test_refuses_impossible_constants_and_laws(changes, error):
    """Negative and NaN constants; laws unnormalised, biased, too short, empty."""
    with pytest.raises(error):
        linear_sum(**changes)


def test_importance_needs_constants():
    """Oracle: the message names the field."""
    problem, _, _ = linear_sum(component_lipschitz=None)
    assert torch.equal(problem.sampling_laws()[0], uniform_law(6))
    with pytest.raises(ConfigError, match="component_lipschitz"):
        problem.sampling_laws("importance")
    with pytest.raises(ConfigError, match="sampling"):
        problem.sampling_laws("sometimes")


def matrix(rows=3, columns=5, seed=0):
    """Return a matrix whose rows and columns have very different norms."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.outer(torch.logspace(-1, 1, rows), torch.logspace(0, 1, columns)).double()
    return torch.randn(rows, columns, generator=g, dtype=F64) * scale


@pytest.mark.parametrize("hollow", [False, True])
@pytest.mark.parametrize("sampling", ["auto", "uniform"])
def test_bilinear_blocks_enumerate_to_the_coupling(sampling, hollow):
    """Oracle: all pairs (row, column) under the product law give (A^T y + c, b - A x)."""
    a, g = matrix(), torch.Generator().manual_seed(1)
    if hollow:
        a[1], a[:, 3] = 0.0, 0.0
    c, b = torch.randn(5, generator=g, dtype=F64), torch.randn(3, generator=g, dtype=F64)
    problem = bilinear_sum(a, sampling=sampling, primal_C=c, dual_R=b)
    z = torch.randn(8, generator=g, dtype=F64)
    x, y = z[:5], z[5:]
    expected = torch.cat((a.T @ y + c, b - a @ x))
    rows, columns = problem.sampling_laws()
    total = torch.zeros(8, dtype=F64)
    for i in range(3):
        for j in range(5):
            weight = torch.stack((1 / (3 * rows[i]), 1 / (5 * columns[j])))[None]
            value = problem.components(z, torch.tensor([[i, j]]), weight)
            total += rows[i] * columns[j] * value
    assert torch.allclose(total, expected, atol=EXACT, rtol=EXACT)
    assert torch.allclose(problem.full(z), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("sampling", ["auto", "uniform"])
def test_bilinear_mean_square_constant(sampling):
    """Oracle: the second moment by enumeration; ``|A|_F`` when drawn by squared norms."""
    a = matrix(4, 4)
    problem = bilinear_sum(a, sampling=sampling)
    rows, columns = problem.sampling_laws()
    dual = (a.square().sum(1) / rows).max()
    primal = (a.square().sum(0) / columns).max()
    bound = problem.mean_square_bound()
    assert bound**2 == pytest.approx(float(torch.maximum(dual, primal)), rel=ROUNDING)
    if sampling == "auto":
        assert bound == pytest.approx(float(torch.linalg.matrix_norm(a)), rel=ROUNDING)


def test_full_without_a_mean_pads_the_shorter_block():
    """Oracle: the coupling itself, from components alone."""
    a = matrix()
    fast = bilinear_sum(a)
    slow = FiniteSumInclusion(
        components=fast.components, num_components=5, start=fast.start, laws=fast.laws
    )
    z = torch.linspace(-1, 1, 8, dtype=F64)
    assert torch.allclose(slow.full(z), fast.full(z), atol=EXACT, rtol=EXACT)


def test_oracle_counts_one_call_per_row_and_column():
    """Oracle: the counts of the contract."""
    problem = bilinear_sum(matrix())
    oracle = Oracle(problem)
    oracle.full(problem.start)
    draw = Draw(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2, dtype=F64))
    oracle.difference(problem.start, problem.start, draw)
    assert (oracle.full_evals, oracle.component_evals, oracle.calls) == (1, 8, 13)
