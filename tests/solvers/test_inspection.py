"""Tests that a problem must pass before it is solved."""

import math

import pytest
import torch

from common.errors import ConfigError
from solvers import FiniteSumInclusion, Inclusion, Oracle, solve
from solvers.inspection import bad_component, check_resolvent
from solvers.resolvents import L1, Box, L2Ball, Simplex

METHODS = ("halpern", "halpern_restarted", "feg", "eag", "forb", "lbfgs", "auto")


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_refused_with_the_reason(method):
    """Oracle: the message says that the operator is random and what to do."""
    layer = torch.nn.Dropout(0.5)
    problem = Inclusion(operator=lambda u: layer(u - 1), start=torch.zeros(50, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"random; call eval\(\)"):
        solve(problem, method)
    layer.eval()
    assert solve(problem, method, atol=1e-3).converged


def test_random_components_are_refused():
    """Oracle: as above; one component is asked twice, whatever their number."""
    layer = torch.nn.Dropout(0.5)
    problem = FiniteSumInclusion(
        components=lambda z, index, weight: weight.sum() * layer(z - 1),
        mean=lambda z: z - 1,
        num_components=50,
        start=torch.zeros(50, dtype=torch.float64),
        lipschitz_bound=1.0,
    )
    with pytest.raises(ConfigError, match="random"):
        solve(problem, "halpern_restarted")


def test_rounding_noise_is_not_called_random():
    """Oracle: noise of float32 rounding size, as parallel sums have, must pass."""
    g = torch.Generator().manual_seed(0)

    def noisy(u):
        return (u - 1) * (1 + 1e-7 * torch.randn(u.shape, generator=g))

    assert solve(Inclusion(operator=noisy, start=torch.zeros(50)), "feg", atol=1e-3).converged


@pytest.mark.parametrize(
    "resolvent",
    [Box(0.0, 1.0), Simplex(), L2Ball(1.0), L1(0.3)],
    ids=lambda resolvent: type(resolvent).__name__,
)
def test_true_resolvents_pass_in_debug_mode(resolvent):
    """Oracle: projections and proximal maps are firmly nonexpansive."""
    for dtype in (torch.float32, torch.float64):
        start = torch.full((8,), 0.25, dtype=dtype)
        problem = Inclusion(operator=lambda u: u - 0.2, start=start, resolvent=resolvent)
        check_resolvent(Oracle(problem), start)
        assert solve(problem, "halpern_restarted", atol=1e-3, debug=True).converged


@pytest.mark.parametrize(
    "wrong",
    [lambda z, step: 1.5 * z, lambda z, step: -0.5 * z, lambda z, step: z + z.sin()],
    ids=["expansive", "reflecting", "wavy"],
)
def test_maps_that_are_no_resolvents_are_refused_in_debug_mode(wrong):
    """Oracle: each map violates |Jx - Jy|^2 <= <Jx - Jy, x - y> somewhere."""
    problem = Inclusion(
        operator=lambda u: u, start=torch.ones(3, dtype=torch.float64), resolvent=wrong
    )
    with pytest.raises(ConfigError, match="not firmly nonexpansive"):
        solve(problem, "halpern", debug=True)


@pytest.mark.parametrize("bad", [0, 3, 16, None])
def test_bad_component_is_found(bad):
    """Oracle: the component that was made NaN; 2 log2(N) blocks are searched, not N."""

    def components(z, index, weight):
        value = weight.sum() * z
        return value * math.nan if bad is not None and bool((index == bad).any()) else value

    start = torch.ones(2, dtype=torch.float64)
    oracle = Oracle(FiniteSumInclusion(components=components, num_components=17, start=start))
    assert bad_component(oracle, start) == bad
    assert oracle.component_evals <= 2 * 17 + 1
