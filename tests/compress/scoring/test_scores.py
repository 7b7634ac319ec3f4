"""One-pass scores against sums over data rows and output channels."""

import pytest
import torch

from compress.scoring import scores
from compress.targets import Problem

EXACT = 1e-9
"""Relative; sums over 500 rows in float64."""


@pytest.fixture
def layer():
    """Return ``unit -> (rows, weight, problem)``: correlated rows whose mean is not zero."""

    def make(unit: int = 1) -> tuple[torch.Tensor, torch.Tensor, Problem]:
        generator = torch.Generator().manual_seed(7)
        normal = {"generator": generator, "dtype": torch.float64}
        x_MI = torch.randn(500, 12, **normal) @ torch.randn(12, 12, **normal) + 0.7
        w_IO = torch.randn(12, 30, **normal)
        problem = Problem(
            gram_II=x_MI.T @ x_MI / 500, weight_IO=w_IO, unit=unit, mean_I=x_MI.mean(0)
        )
        return x_MI, w_IO, problem

    return make


def parts(x_MI: torch.Tensor, w_IO: torch.Tensor, unit: int) -> torch.Tensor:
    """Return what every component adds to every output (M, N, O)."""
    return torch.stack(
        [x @ w for x, w in zip(x_MI.split(unit, 1), w_IO.split(unit), strict=True)], dim=1
    )


@pytest.mark.parametrize("unit", [1, 3])
def test_similarity_is_the_mean_product_of_parts(layer, unit):
    """Oracle: the definition of the CSM over rows, summed over outputs."""
    x_MI, w_IO, problem = layer(unit)
    a_MNO = parts(x_MI, w_IO, unit)
    expected = torch.einsum("mio,mjo->ij", a_MNO, a_MNO) / len(x_MI)
    torch.testing.assert_close(scores.similarity(problem), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("unit", [1, 3])
def test_energy_rowsum_alpha_follow_the_definitions(layer, unit):
    """Oracle: means over rows of parts and outputs."""
    x_MI, w_IO, problem = layer(unit)
    a_MNO = parts(x_MI, w_IO, unit)
    y_MO = x_MI @ w_IO
    energy = a_MNO.square().sum(2).mean(0)
    rowsum = torch.einsum("mo,mno->n", y_MO, a_MNO) / len(x_MI)
    torch.testing.assert_close(scores.energy(problem), energy, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(scores.rowsum(problem), rowsum, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(scores.alpha(problem), rowsum / energy, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("unit", [1, 3])
def test_singleton_is_what_one_component_explains(layer, unit):
    """Oracle: a regression of the output on each component's rows."""
    x_MI, w_IO, problem = layer(unit)
    y_MO = x_MI @ w_IO
    explained = []
    for x_MU in x_MI.split(unit, 1):
        residual = y_MO - x_MU @ torch.linalg.lstsq(x_MU, y_MO).solution
        explained.append((y_MO.square().sum() - residual.square().sum()) / len(x_MI))
    torch.testing.assert_close(
        scores.singleton(problem), torch.stack(explained), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("unit", [1, 3])
def test_the_cholesky_score_is_the_energy_plus_a_constant(layer, unit):
    """Squared row norms of a Cholesky factor are the diagonal of what was factored."""
    _, _, problem = layer(unit)
    energy = scores.energy(problem)
    ridge = problem.ridge * energy.mean()
    torch.testing.assert_close(scores.cholesky(problem), energy + ridge, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("unit", [1, 3])
def test_votes_are_counted_over_outputs(layer, unit):
    """Oracle: squared correlations (unit 1) or regressions per output, sorted one by one."""
    x_MI, w_IO, problem = layer(unit)
    y_MO = x_MI @ w_IO
    count = problem.components
    fidelity_NO = torch.zeros(count, 30, dtype=torch.float64)
    for n, x_MU in enumerate(x_MI.split(unit, 1)):
        residual = y_MO - x_MU @ torch.linalg.lstsq(x_MU, y_MO).solution
        fidelity_NO[n] = 1 - residual.square().sum(0) / y_MO.square().sum(0)
    votes = [0] * count
    for output in range(30):
        ordered = sorted(range(count), key=lambda n: -float(fidelity_NO[n, output]))
        for n in ordered[: max(1, round(0.1 * count))]:
            votes[n] += 1
    expected = sorted(range(count), key=lambda n: (votes[n], float(fidelity_NO[n].sum())))
    assert scores.vote(problem).argsort().tolist() == expected
    assert scores.vote(problem).floor().tolist() == votes


def test_dead_outputs_add_nothing_to_a_vote(layer):
    """Outputs without weights have no favourites: the others decide alone."""
    _, w_IO, problem = layer()
    wider = torch.cat([w_IO, torch.zeros(12, 200, dtype=torch.float64)], dim=1)
    other = Problem(gram_II=problem.gram_II, weight_IO=wider)
    assert torch.equal(scores.vote(other), scores.vote(problem))


def test_wanda_and_flap_sum_their_inputs(layer):
    """Oracle: the published formulas over rows; FLAP looks at the variance."""
    x_MI, w_IO, problem = layer(3)
    wanda_I = x_MI.square().mean(0).sqrt() * w_IO.abs().sum(1)
    flap_I = x_MI.var(0, correction=0) * w_IO.square().sum(1)
    for found, values_I in ((scores.wanda, wanda_I), (scores.flap, flap_I)):
        expected = values_I.reshape(4, 3).sum(1)
        torch.testing.assert_close(found(problem), expected, rtol=EXACT, atol=EXACT)


def test_flap_takes_a_gram_without_a_mean_as_centred(layer):
    """With the covariance as Gram the result is the same."""
    x_MI, w_IO, problem = layer()
    centred = Problem(gram_II=torch.cov(x_MI.T, correction=0), weight_IO=w_IO)
    torch.testing.assert_close(scores.flap(centred), scores.flap(problem), rtol=EXACT, atol=EXACT)


def test_outputs_that_cancel_have_no_energy(layer):
    """Two copies of an input with opposite weights: the output is 0 up to rounding."""
    _, _, problem = layer()
    gram = problem.gram_II.clone()
    gram[1], gram[:, 1] = gram[0], gram[:, 0]
    gram[1, 1] = gram[0, 0]
    weight = torch.zeros(12, 2, dtype=torch.float64)
    weight[0, 0], weight[1, 0], weight[2, 1] = 0.1, -0.1, 0.1
    energies = scores.output_energies(Problem(gram_II=gram, weight_IO=weight))
    assert float(energies[0]) == 0.0 < float(energies[1])
