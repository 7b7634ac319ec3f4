"""The multiplier search against an interior-point solver of the same semidefinite programme."""

import pytest
import torch

from solvers.bounds.mlp_block import tighten_mlp

EQUAL = 1e-4  # relative
STORED_DIGITS = 1e-6  # accuracy of the interior-point solver
MIDDLE, REACH = 0.4429090264859598, 0.5570946453938833  # erf GELU / 1.1289: mid slope, half width
# Width, residual weight, norm of both matrices, kind; optimum by cvxpy 1.9.3 with Clarabel 0.11.1.
CASES = [
    (8, 0.125, 1.0, "waves", 0.9205202),
    (8, 1.0, 1.0, "orthogonal", 0.9137636),
    (12, 0.5, 2.0, "waves", 1.3259443),
    (16, 0.5, 1.0, "waves", 0.6879412),
    (16, 0.125, 1.0, "orthogonal", 0.9675686),
    (16, 0.25, 4.0, "orthogonal", 3.9965064),
]


def block(width, residual, norm, kind):
    """(C, B, G) from a formula, so that no generator of random numbers is part of the figures."""
    i = torch.arange(4 * width, dtype=torch.float64)[:, None]
    j = torch.arange(width, dtype=torch.float64)
    up, down = torch.sin(12.9898 * i * i + 78.233 * j * j), torch.cos(i * i * 4.1414 + 9.7 * j * j)
    if kind == "orthogonal":
        up, down = torch.linalg.qr(up).Q, torch.linalg.qr(down).Q
    up, down = (norm * m / torch.linalg.matrix_norm(m, 2) for m in (up, down))
    C = (1 - residual) * torch.eye(width, dtype=torch.float64) + residual * MIDDLE * down.T @ up
    return C, residual * REACH * down.T, up


def interior_point(C, B, G):
    """Minimise rho over rho I >= [[G^T L G, C^T], [C, B M B^T]], M >= 1 / L."""
    cvxpy = pytest.importorskip("cvxpy", reason="cvxpy with Clarabel is not installed")
    # In units of the closed form "init" all multipliers are near one.
    unit = (B.norm(dim=0) / G.norm(dim=1)).sqrt()
    B, G = B / unit, G * unit[:, None]
    x_terms = torch.einsum("ni,nj->ijn", G, G).flatten(0, 1).numpy()
    y_terms = torch.einsum("in,jn->ijn", B, B).flatten(0, 1).numpy()
    eye = torch.eye(len(C), dtype=torch.float64).numpy()
    rho, direct, inverse = cvxpy.Variable(), cvxpy.Variable(len(G)), cvxpy.Variable(len(G))
    x = cvxpy.reshape(x_terms @ direct, C.shape, order="C")
    y = cvxpy.reshape(y_terms @ inverse, C.shape, order="C")
    k = cvxpy.bmat([[rho * eye - x, -C.T.numpy()], [-C.numpy(), rho * eye - y]])
    twos = 2 * torch.ones(len(G)).numpy()
    cone = cvxpy.SOC(direct + inverse, cvxpy.vstack([twos, direct - inverse]))
    return float(cvxpy.Problem(cvxpy.Minimize(rho), [k >> 0, cone]).solve(solver=cvxpy.CLARABEL))


@pytest.mark.parametrize(("width", "residual", "norm", "kind", "stored"), CASES)
def test_search_reaches_the_stored_optimum(width, residual, norm, kind, stored):
    """Oracle: stored optima of the semidefinite programme; primal above, dual below, both near."""
    C, B, G = block(width, residual, norm, kind)
    found = tighten_mlp(C, B, G, tol=2e-4, max_evals=2000, method="lbfgs")
    assert stored * (1 - STORED_DIGITS) <= found.primal <= stored * (1 + EQUAL)
    assert stored * (1 - EQUAL) <= found.dual <= stored * (1 + STORED_DIGITS)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("case", CASES)
def test_stored_optimum_is_the_interior_point_solution(case):
    """Oracle: cvxpy with Clarabel, where it is installed."""
    assert interior_point(*block(*case[:4])) == pytest.approx(case[4], rel=STORED_DIGITS)
