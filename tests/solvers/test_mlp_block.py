"""The K-form of an MLP block: soundness, gradient, duality, invariances and special neurons."""

import itertools
import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from solvers.bounds.kform import METHODS, minimise
from solvers.bounds.mlp_block import mlp_objective, tighten_mlp

ROUNDING = 1e-10  # eigenvalues of order one in float64
MIDDLE, REACH = 0.4429090264859598, 0.5570946453938833  # erf GELU / 1.1289: mid slope, half width


def block(width=12, neurons=32, residual=0.125, norm=1.0, seed=0, middle=MIDDLE, reach=REACH):
    """(C, B, G) of a random block with both matrices of the given spectral norm."""
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(neurons, width, generator=g, dtype=torch.float64)
    down = torch.randn(width, neurons, generator=g, dtype=torch.float64)
    up *= norm / torch.linalg.matrix_norm(up, 2)
    down *= norm / torch.linalg.matrix_norm(down, 2)
    identity = torch.eye(width, dtype=torch.float64)
    return (1 - residual) * identity + residual * middle * down @ up, residual * reach * down, up


def spectral(matrix):
    """Largest singular value."""
    return float(torch.linalg.matrix_norm(matrix, 2))


def top(C, B, G, theta):
    """lambda_max(K), formed here independently of the package."""
    lam = theta.exp()
    x, y = G.T @ (lam[:, None] * G), B @ (B.T / lam[:, None])
    k = torch.cat((torch.cat((x, C.T), 1), torch.cat((C, y), 1)))
    return float(torch.linalg.eigvalsh(k)[-1])


def local_search(C, B, G, seed, sweeps=20):
    """Largest |C + B S G| found by flipping signs with the top singular vectors."""
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(0, 2, (B.shape[1],), generator=g).double() * 2 - 1
    best = 0.0
    for _ in range(sweeps):
        u, sizes, vh = torch.linalg.svd(C + (B * s) @ G)
        best = max(best, float(sizes[0]))
        s = torch.sign((B.T @ u[:, 0]) * (G @ vh[0]))
        s[s == 0] = 1.0
    return best


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_gap(method):
    """Oracle: an independent eigenvalue at theta; the dual and the gap are from weak duality."""
    C, B, G = block()
    solution = tighten_mlp(C, B, G, tol=0.02, method=method, max_evals=2000)
    assert solution.primal == pytest.approx(top(C, B, G, solution.theta), rel=ROUNDING)
    assert solution.dual <= solution.primal
    assert solution.gap <= 0.02 * spectral(B) * spectral(G)
    assert solution.method == method


def test_bound_covers_every_sign_pattern():
    """Oracle: brute force over all S in {-1, 1}^10, where the maximum over |S| <= 1 is attained."""
    C, B, G = block(width=4, neurons=10, residual=0.5, norm=2.0)
    solution = tighten_mlp(C, B, G, tol=1e-3, method="lbfgs")
    worst = max(
        spectral(C + (B * torch.tensor(s, dtype=torch.float64)) @ G)
        for s in itertools.product((-1.0, 1.0), repeat=10)
    )
    assert worst <= solution.primal + ROUNDING
    # The relaxation is tight here to a few per cent: a bound twice too large would be noticed.
    assert solution.primal <= 1.1 * worst


@pytest.mark.parametrize("seed", range(20))
def test_any_multipliers_are_sound(seed):
    """Property: random positive lambda and random |S| <= 1 never break the inequality."""
    C, B, G = block(seed=seed)
    g = torch.Generator().manual_seed(seed)
    theta = 2 * torch.randn(B.shape[1], generator=g, dtype=torch.float64)
    bound = mlp_objective(C, B, G).value(theta)
    for _ in range(20):
        s = 2 * torch.rand(B.shape[1], generator=g, dtype=torch.float64) - 1
        assert spectral(C + (B * s) @ G) <= bound + ROUNDING


@pytest.mark.parametrize("seed", range(5))
def test_local_search_stays_below_the_bound_and_comes_close(seed):
    """Oracle: an attack over S; below the bound always, within 10 % of the gain here."""
    C, B, G = block(width=16, neurons=64, seed=seed, norm=2.0)
    solution = tighten_mlp(C, B, G)
    attack = max(local_search(C, B, G, start) for start in range(5))
    assert attack <= solution.primal + ROUNDING
    naive = spectral(C) + spectral(B) * spectral(G)
    assert solution.primal - attack <= 0.5 * (naive - attack)


@pytest.mark.parametrize("mu", [0.3, 0.01])
def test_gradient_matches_finite_differences(mu):
    """Oracle: central differences of mu log tr exp(K / mu)."""
    C, B, G = block(width=5, neurons=7)
    form = mlp_objective(C, B, G)
    term = form.terms[0]

    def smooth(theta):
        return mu * float(torch.logsumexp(torch.linalg.eigvalsh(form.matrix(term, theta)) / mu, 0))

    theta = torch.linspace(-1, 1, 7, dtype=torch.float64)
    gradient = form.gradient(theta, mu)
    step = 1e-5
    for i in range(7):
        shift = torch.zeros(7, dtype=torch.float64)
        shift[i] = step
        slope = (smooth(theta + shift) - smooth(theta - shift)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_dual_never_passes_any_primal_value(seed):
    """Weak duality: duals at random points stay below primals at others."""
    C, B, G = block(seed=seed, norm=3.0)
    form = mlp_objective(C, B, G)
    g = torch.Generator().manual_seed(seed)
    for mu in (1.0, 0.1, 0.01, 1e-3):
        theta = torch.randn(B.shape[1], generator=g, dtype=torch.float64)
        form.moments(theta, mu)
    assert form.dual <= tighten_mlp(C, B, G, tol=1e-3, method="lbfgs").primal + ROUNDING
    assert form.dual <= form.best


def test_two_neurons_match_a_grid():
    """Oracle: a dense grid over both multipliers, independent of any solver."""
    C, B, G = block(width=3, neurons=2, residual=0.7, norm=1.5)
    solution = tighten_mlp(C, B, G, tol=1e-4, method="lbfgs")
    centre = solution.theta.clone()
    grid = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
    best = min(top(C, B, G, centre + torch.stack((x, y))) for x, y in itertools.product(grid, grid))
    assert solution.primal <= best + 1e-4 * spectral(B) * spectral(G)
    assert solution.dual <= best + ROUNDING


def test_rotating_the_residual_basis_changes_nothing():
    """Invariance: G U^T, U C U^T, U B have the same norm for every S."""
    C, B, G = block()
    g = torch.Generator().manual_seed(5)
    U = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    solution = tighten_mlp(C, B, G)
    turned = tighten_mlp(U @ C @ U.T, U @ B, G @ U.T, theta0=solution.theta, max_evals=0)
    assert turned.primal == pytest.approx(solution.primal, rel=1e-9)


@pytest.mark.parametrize("side", ["up", "down", "both"])
def test_dead_neuron_equals_deleted_neuron(side):
    """Oracle: the block without that neuron; its stored multiplier must not cost anything."""
    C, B, G = block()
    B, G = B.clone(), G.clone()
    if side in ("down", "both"):
        B[:, 3] = 0
    if side in ("up", "both"):
        G[3] = 0
    keep = torch.arange(32) != 3
    full, small = tighten_mlp(C, B, G), tighten_mlp(C, B[:, keep], G[keep])
    assert full.primal == pytest.approx(small.primal, rel=ROUNDING)
    assert torch.allclose(full.theta[keep], small.theta)
    assert top(C, B, G, full.theta) == pytest.approx(small.primal, rel=1e-9)


def test_all_dead_leaves_the_norm_of_the_constant_part():
    """Oracle: |C|; and a residual weight of 0 gives exactly 1."""
    C, B, G = block()
    assert tighten_mlp(C, 0 * B, G).primal == pytest.approx(spectral(C))
    identity = torch.eye(12, dtype=torch.float64)
    solution = tighten_mlp(identity, 0 * B, G)
    assert solution.primal == pytest.approx(1.0, rel=1e-12)
    assert top(identity, 0 * B, G, solution.theta) == pytest.approx(1.0, rel=1e-12)


def test_result_is_never_worse_than_the_closed_forms():
    """Oracle: "mid" = |C| + |B||G|, which even an empty budget must reach."""
    for seed in range(5):
        C, B, G = block(seed=seed, norm=4.0)
        closed = tighten_mlp(C, B, G, max_evals=0)
        assert closed.primal <= spectral(C) + spectral(B) * spectral(G) + ROUNDING
        assert closed.method in ("mid", "init")
        assert tighten_mlp(C, B, G).primal <= closed.primal


def test_warm_start_is_used_and_never_worse():
    """Oracle: the value of the warm start itself; pruning re-solves from surviving multipliers."""
    C, B, G = block(norm=2.0)
    first = tighten_mlp(C, B, G, tol=1e-3, method="lbfgs")
    again = tighten_mlp(C, B, G, tol=2e-3, theta0=first.theta)
    assert again.primal <= first.primal + ROUNDING
    assert again.evals < first.evals


def test_non_square_blocks_and_scaling():
    """Invariance: |s C + s B S G| = s |C + B S G|, on a block with different widths."""
    g = torch.Generator().manual_seed(1)
    C, B, G = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((5, 8), (5, 9), (9, 8)))
    solution = tighten_mlp(C, B, G, tol=1e-3, method="lbfgs")
    scaled = tighten_mlp(3 * C, 3 * B, G, tol=1e-3, method="lbfgs")
    assert local_search(C, B, G, 0) <= solution.primal + ROUNDING
    assert scaled.primal == pytest.approx(3 * solution.primal, rel=5e-3)


def test_continuation_needs_few_evaluations():
    """Budget: a 1 % gap at width 64 takes at most 40 eigen-decompositions."""
    C, B, G = block(width=64, neurons=256)
    assert tighten_mlp(C, B, G).evals <= 40


@pytest.mark.parametrize("method", METHODS)
def test_solver_is_deterministic(method):
    """Oracle: the same solve twice, bit for bit."""
    C, B, G = block()
    first, second = (tighten_mlp(C, B, G, method=method, max_evals=30) for _ in range(2))
    assert torch.equal(first.theta, second.theta)
    assert (first.primal, first.dual) == (second.primal, second.dual)


def test_refuses_what_does_not_fit():
    """Wrong shapes, NaN weights, unknown methods and impossible tolerances."""
    C, B, G = block()
    with pytest.raises(ShapeError):
        tighten_mlp(C, B, G.T)
    with pytest.raises(ShapeError):
        tighten_mlp(C, B, G, theta0=torch.zeros(3))
    with pytest.raises(ConfigError, match="NaN"):
        tighten_mlp(C, B * math.nan, G)
    with pytest.raises(ConfigError, match="method"):
        tighten_mlp(C, B, G, method="newton")
    with pytest.raises(ConfigError, match="tol"):
        tighten_mlp(C, B, G, tol=0.0)
    with pytest.raises(ConfigError, match="gap"):
        minimise(mlp_objective(C, B, G), torch.zeros(32).double(), gap=-1.0)
