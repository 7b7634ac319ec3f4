"""The three ways to see the top of a spectrum, and searches that use each of them."""

import math

import pytest
import torch

from solvers.bounds import kform, spectrum
from solvers.bounds.kform import KForm
from solvers.bounds.mlp_block import mlp_objective, norm_est, tighten_mlp
from solvers.bounds.spectrum import Dense, Halved, Krylov
from solvers.bounds.terms import Factor, Term

ROUNDING = 1e-12  # relative to the top eigenvalue, float64
SINGLE = 3e-6  # the same in float32
TOL = 0.01


def block(width=40, residual=0.125, norm=1.0, seed=0):
    """(C, B, G) of a random block with both matrices of the given spectral norm."""
    g = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(4 * width, width, generator=g, dtype=torch.float64) for _ in range(2))
    up, down = (norm * m / torch.linalg.matrix_norm(m, 2) for m in (up, down))
    C = (1 - residual) * torch.eye(width, dtype=torch.float64) + 0.44 * residual * down.T @ up
    return C, 0.56 * residual * down.T, up


def instance(**kind):
    """(term, theta, mu) near the optimum of a random block."""
    C, B, G = block(**kind)
    term = mlp_objective(C, B, G).terms[0]
    mu = TOL * float(torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(G, 2)) / 5
    return term, B.norm(dim=0).log() - G.norm(dim=1).log(), mu


def softmax_moment(found, mu):
    """Density matrix of the smoothed eigenvalue."""
    weights = torch.softmax(found.values_R / mu, 0)
    return (found.vectors_DR * weights) @ found.vectors_DR.T


@pytest.mark.parametrize(("norm", "residual"), [(1.0, 0.125), (2.0, 0.125), (1.0, 0.04)])
@pytest.mark.parametrize("engine", [Halved, Krylov])
def test_reduced_spectra_agree_with_the_full_one(engine, norm, residual):
    """Oracle: eigh of the whole matrix; its softmax-weighted projector is what gradients see."""
    term, theta, mu = instance(norm=norm, residual=residual)
    full, found = Dense(term)(theta, mu), engine(term)(theta, mu)
    top = float(full.values_R[-1])
    assert found.vectors_DR.norm(dim=0).sub(1).abs().max() < ROUNDING
    assert -ROUNDING <= (top - float(found.values_R[-1])) <= 1e-3 * mu
    error = softmax_moment(found, mu) - softmax_moment(full, mu)
    assert float(error.norm()) <= 0.02
    assert engine(term).top(theta) == pytest.approx(top, rel=ROUNDING)


def test_reduction_gives_way_without_a_residual_path():
    """Oracle: eigh; with a weak C the eliminated half is not small and the full matrix is used."""
    term, theta, mu = instance(residual=1.0)
    engine = Halved(term)
    full, found = Dense(term)(theta, mu), engine(theta, mu)
    assert not engine.is_useful
    assert torch.equal(full.values_R, found.values_R)
    assert engine.top(theta) == pytest.approx(float(full.values_R[-1]), rel=ROUNDING)


@pytest.mark.parametrize("engine", [Halved, Krylov])
def test_float32_is_used_where_it_resolves_the_smoothing(engine, monkeypatch):
    """Oracle: eigh; fine smoothing and refinement both lead back to float64."""
    monkeypatch.setattr(spectrum, "COARSE_DIM", 2)
    term, theta, _ = instance()
    used = engine(term)
    top = used.top(theta)
    assert float(used(theta, 1e-3).values_R[-1]) == pytest.approx(top, rel=SINGLE)
    assert used.term_for(1e-3) is used.coarse
    fine = used(theta, 1e-6)
    assert used.term_for(1e-6) is term
    assert float(fine.values_R[-1]) == pytest.approx(top, rel=1e-9)
    assert used.refine()
    assert used.term_for(1e-3) is term


def test_krylov_search_of_a_clustered_spectrum():
    """Oracle: a diagonal matrix; ten equal top values and a dense rest."""
    values = torch.cat((torch.linspace(-1, 0.9, 190, dtype=torch.float64), torch.ones(10)))
    start = spectrum.random_block(200, 16, values)
    found = spectrum.top_ritz(
        lambda b: values.double()[:, None] * b, start, lambda v: torch.full_like(v, 1e-8)
    )
    assert found.values_R[-10:].sub(1).abs().max() < ROUNDING
    assert found.values_R[-11] == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("method", ["halpern_anderson", "lbfgs"])
@pytest.mark.parametrize("mode", ["halved", "krylov", "float32"])
def test_every_mode_reaches_the_gap_with_an_exact_primal_value(mode, method, monkeypatch):
    """Oracle: eigvalsh at theta, and the dual value of a search by full decompositions."""
    monkeypatch.setattr(kform, "HALVED_DIM", 2)
    monkeypatch.setattr(kform, "KRYLOV_DIM", 2 if mode == "krylov" else 10**9)
    monkeypatch.setattr(spectrum, "COARSE_DIM", 2 if mode == "float32" else 10**9)
    C, B, G = block()
    found = tighten_mlp(C, B, G, tol=TOL, method=method)
    monkeypatch.setattr(kform, "HALVED_DIM", 10**9)
    monkeypatch.setattr(kform, "KRYLOV_DIM", 10**9)
    form = mlp_objective(C, B, G)
    size = float(torch.linalg.matrix_norm(B, 2) * torch.linalg.matrix_norm(G, 2))
    assert found.primal == pytest.approx(form.value(found.theta), rel=ROUNDING)
    assert found.gap <= TOL * size
    reference = tighten_mlp(C, B, G, tol=TOL / 5, method="lbfgs")
    assert found.dual <= reference.primal
    assert reference.dual <= found.primal <= reference.primal + TOL * size


def test_unequal_blocks_and_diagonal_constants_are_not_rescaled():
    """Oracle: the smallest primal value; a dual value that rescales wrongly would pass it."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randn(12, 6, generator=g, dtype=torch.float64) for _ in range(4)]
    index = torch.arange(12)
    constant = torch.randn(12, 12, generator=g, dtype=torch.float64)
    factors = tuple(
        Factor(r / 4, index, s, o)
        for r, s, o in zip(rows, (1, -1, 1, -1), (0, 0, 6, 6), strict=True)
    )
    term = Term(12, 1.0, constant + constant.T, factors)
    assert not term.is_coupled
    form = KForm((term,), 12)
    solved = kform.minimise(form, torch.zeros(12).double(), gap=0.05, method="lbfgs")
    assert 0 <= solved.primal - solved.dual <= 0.05
    for seed in range(20):
        g.manual_seed(seed)
        theta = solved.theta + 0.3 * torch.randn(12, generator=g, dtype=torch.float64)
        assert form.value(theta) >= solved.dual


def test_matrix_and_product_of_a_term_agree(monkeypatch):
    """Oracle: the formula with a plain product; strips of the Gram matrix change nothing."""
    term, theta, _ = instance(width=30)
    whole = term.matrix(theta)
    probe = torch.eye(60, dtype=torch.float64)
    assert torch.allclose(term.product(theta, probe), whole, atol=ROUNDING)
    monkeypatch.setattr("solvers.bounds.terms._STRIP", 7)
    assert torch.allclose(term.matrix(theta), whole, atol=ROUNDING)


@pytest.mark.parametrize("shape", [(300, 90), (90, 300), (20, 500)])
def test_norm_estimate_is_close_from_below(shape):
    """Oracle: SVD."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=g, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert exact * (1 - 1e-4) <= norm_est(matrix) <= exact * (1 + ROUNDING)
    assert math.isfinite(norm_est(matrix))
