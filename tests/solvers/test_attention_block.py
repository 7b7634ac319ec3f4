"""The multiplier search of attention blocks: near-optimal, sound dual, shared and dead heads."""

import math

import pytest
import torch

from common.errors import ConfigError, ShapeError
from common.models.config import LayerConfig
from solvers.bounds.attention_block import head_matrices
from solvers.bounds.attention_proof import attention_bound, split_heads
from solvers.bounds.attention_search import search_attention
from solvers.bounds.ellipsoid import Ellipsoid

ROUNDING = 1e-9
WIDTH, DIM, RADIUS = 12, 4, 2.0
DOMAIN = RADIUS * torch.eye(WIDTH, dtype=torch.float64)


def attention_layer(heads=3, kv_heads=3, content_heads=None):
    """A layer with heads of width 4 on a stream of width 12."""
    return LayerConfig(
        heads=heads,
        kv_heads=kv_heads,
        content_heads=heads if content_heads is None else content_heads,
        head_dim=DIM,
        mlp_width=8,
        activation="gelu",
        gelu_divisor=1.1289,
        mlp_bias=False,
        position_bias=False,
        attn_residual=0.25,
        mlp_residual=0.25,
        attn_factor=1 / 3,
        softmax_scale=1.0,
    )


def weights(layer, seed=0):
    """Random query, key, value and output matrices of the layer's shapes."""
    g = torch.Generator().manual_seed(seed)
    rows = (layer.content_heads, layer.content_kv_heads, layer.kv_heads)
    matrices = [torch.randn(n * DIM, WIDTH, generator=g, dtype=torch.float64) for n in rows]
    out = torch.randn(WIDTH, layer.heads * DIM, generator=g, dtype=torch.float64)
    return [m / 3 for m in (*matrices, out)]


def value_at(matrices, layer, multipliers):
    """The trusted formula at these multipliers."""
    names = ("query.weight", "key.weight", "value.weight", "output.weight")
    tensors = {name: m for name, m in zip(names, matrices, strict=True) if m is not None}
    heads = split_heads(tensors, layer)
    return attention_bound(heads, layer, Ellipsoid.ball(WIDTH, RADIUS), multipliers)


def _outer_top(matrices, layer, value_H):
    """Largest eigenvalue of sum_h M_h M_h^T / value_h, written out."""
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for head in range(layer.heads):
        kv = head // layer.group
        through = matrices[3][:, head * DIM : (head + 1) * DIM]
        through = through @ matrices[2][kv * DIM : (kv + 1) * DIM]
        total += through @ through.T / value_H[head]
    return float(torch.linalg.eigvalsh(total)[-1])


@pytest.mark.parametrize(("heads", "kv_heads", "content"), [(3, 3, 3), (4, 2, 4), (4, 2, 2)])
def test_head_matrices_agree_with_slices(heads, kv_heads, content):
    """Oracle: slicing by hand; factor^T factor must equal M M^T for every query head."""
    layer = attention_layer(heads, kv_heads, content)
    query, key, value, output = weights(layer)
    found = head_matrices(query, key, value, output, layer)
    assert (found.query_HDC.shape[0], found.key_KDC.shape[0]) == (content, content // layer.group)
    for head in range(heads):
        kv = head // layer.group
        w_o = output[:, head * DIM : (head + 1) * DIM]
        product = w_o @ value[kv * DIM : (kv + 1) * DIM]
        factor = found.factor_HDC[head]
        assert torch.allclose(factor.T @ factor, product @ product.T, atol=1e-12)
        assert torch.equal(found.output_HCD[head], w_o)


@pytest.mark.parametrize("method", ["halpern_anderson", "halpern_restarted", "lbfgs"])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_within_its_gap(method, seed):
    """Oracle: the trusted formula; the dual bounds it from below for the same ``mixed``."""
    layer = attention_layer()
    matrices = weights(layer, seed)
    found = search_attention(matrices, layer, DOMAIN, tol=0.01, method=method, max_evals=1000)
    bound = value_at(matrices, layer, found.multipliers)
    assert found.dual <= bound + ROUNDING
    assert bound <= found.dual * 1.03


@pytest.mark.parametrize("seed", range(3))
def test_no_nearby_multipliers_are_much_better(seed):
    """Oracle: random changes of all multipliers at three scales, through the trusted formula."""
    layer = attention_layer()
    matrices = weights(layer, seed)
    found = search_attention(matrices, layer, DOMAIN, tol=1e-3, method="lbfgs")
    bound = value_at(matrices, layer, found.multipliers)
    g = torch.Generator().manual_seed(seed)
    for trial in range(60):
        scale = (0.01, 0.1, 1.0)[trial % 3]
        changed = {
            name: m * (scale * torch.randn(len(m), generator=g, dtype=torch.float64)).exp()
            for name, m in found.multipliers.items()
            if name != "mixed"
        } | {"mixed": found.multipliers["mixed"]}
        assert value_at(matrices, layer, changed) >= bound * (1 - 2e-3)


def test_value_path_of_two_heads_matches_a_grid():
    """Oracle: min over p of sqrt lambda_max(sum M M^T / p) on a dense grid, and its limits."""
    layer = attention_layer(2, 2)
    matrices = weights(layer)
    found = search_attention(matrices, layer, DOMAIN, tol=1e-4, method="lbfgs")
    tau = math.sqrt(float(found.growth.sum()) * _outer_top(matrices, layer, found.growth))
    value, output = matrices[2], matrices[3]
    maps = [output[:, s] @ value[s] for s in (slice(0, DIM), slice(DIM, 2 * DIM))]
    first, second = (m @ m.T for m in maps)
    grid = min(
        float(torch.linalg.eigvalsh(first / p + second / (1 - p))[-1])
        for p in torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    )
    assert tau == pytest.approx(math.sqrt(grid), rel=1e-3)
    norms = [float(torch.linalg.matrix_norm(m, 2)) for m in maps]
    assert max(norms) - ROUNDING <= tau <= sum(norms) * (1 + 1e-3)


def test_shared_key_value_heads_equal_repeated_ones():
    """Oracle: the same block written with one KV head per query head."""
    shared = attention_layer(4, 2)
    query, key, value, output = weights(shared)
    repeated = [m.view(2, DIM, WIDTH).repeat_interleave(2, 0).flatten(0, 1) for m in (key, value)]
    plain = attention_layer(4, 4)
    one = search_attention((query, key, value, output), shared, DOMAIN)
    two = search_attention((query, *repeated, output), plain, DOMAIN)
    for name in one.multipliers:
        assert torch.allclose(one.multipliers[name], two.multipliers[name], rtol=1e-6)


def test_positional_heads_need_no_score_multipliers():
    """Oracle: without content heads the bound is the value path alone."""
    layer = attention_layer(content_heads=0)
    _, _, value, output = weights(layer)
    found = search_attention((None, None, value, output), layer, DOMAIN)
    assert set(found.multipliers) == {"value"}
    bound = value_at((None, None, value, output), layer, found.multipliers)
    top = _outer_top((None, None, value, output), layer, found.growth)
    assert bound == pytest.approx(math.sqrt(float(found.growth.sum()) * top), rel=1e-2)


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_dead_head_costs_nothing(name):
    """Oracle: the same block whose first head is removed by hand (for dead value or output)."""
    layer = attention_layer()
    matrices = weights(layer)
    index = ("query", "key", "value", "output").index(name)
    matrices[index] = matrices[index].clone()
    if name == "output":
        matrices[index][:, :DIM] = 0
    else:
        matrices[index][:DIM] = 0
    found = search_attention(matrices, layer, DOMAIN, tol=1e-3)
    assert all(bool((m > 0).all() and m.isfinite().all()) for m in found.multipliers.values())
    bound = value_at(matrices, layer, found.multipliers)
    assert bound <= found.dual * 1.01
    if name in ("value", "output"):
        rest = [m[DIM:] for m in matrices[:3]] + [matrices[3][:, DIM:]]
        small = attention_layer(2, 2)
        other = search_attention(rest, small, DOMAIN, tol=1e-3)
        alone = value_at(rest, small, other.multipliers)
        assert bound == pytest.approx(alone, rel=5e-3)


def test_refuses_weights_that_do_not_fit():
    """Wrong shapes name what was expected; NaN is refused."""
    layer = attention_layer()
    query, key, value, output = weights(layer)
    with pytest.raises(ShapeError, match=r"Wk: expected \(12, 12\)"):
        head_matrices(query, key[:DIM], value, output, layer)
    with pytest.raises(ShapeError, match="None"):
        head_matrices(None, key, value, output, layer)
    with pytest.raises(ConfigError, match="Wv"):
        head_matrices(query, key, value * math.nan, output, layer)
