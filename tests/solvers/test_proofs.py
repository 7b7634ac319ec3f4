"""Block proofs hold for any positive multipliers, and equal their formulas."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import CertificateError
from common.models import LipschitzTransformer, ModelConfig
from common.models.config import ACTIVATIONS
from solvers.bounds import certify
from solvers.bounds.admissible import multiplier_shapes
from solvers.bounds.attention_proof import (
    attention_bound,
    naive_attention,
    split_heads,
    value_path,
)
from solvers.bounds.ellipsoid import Ellipsoid, Tokens
from solvers.bounds.head_proof import head_norms
from solvers.bounds.mlp_proof import mlp_bound, mlp_form, value_at_zero
from solvers.bounds.slopes import slope_interval
from solvers.bounds.stream_proof import prove_block

TIGHT = 1e-7  # proved values may lie this much above the same formula without margins
TINY_MODEL = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 10, "context": 8}

BuildModel = Callable[..., LipschitzTransformer]


def _random_multipliers(
    model: LipschitzTransformer, index: int, spread: float
) -> dict[str, Tensor]:
    shapes = multiplier_shapes(model.config.layer(index // 2), index)
    return {
        name: (spread * torch.randn(size, dtype=torch.float64)).exp()
        for name, size in shapes.items()
    }


def _prove(model: LipschitzTransformer, index: int, radius: float, spread: float = 0.5) -> Any:
    multipliers = _random_multipliers(model, index, spread)
    tokens = Tokens.ball(model.config.width, radius)
    return prove_block(model.config, model.state_dict(), index, tokens, multipliers)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_form_covers_every_slope_pattern(build_model: BuildModel, activation: str) -> None:
    """Oracle: the Jacobian written with explicit slopes (elementwise) or permutations (MaxMin)."""
    model = build_model(**TINY_MODEL, activation=activation, mlp_residual=0.7)
    layer, mlp = model.config.layer(0), model.layers[0].mlp
    up, down = mlp.up.weight, mlp.down.weight
    form = mlp_form(up, down, layer)
    low, high = slope_interval(activation, layer.gelu_divisor)
    for _ in range(50):
        if activation == "maxmin":
            s = torch.randint(0, 2, (5,)).double() * 2 - 1
            kept = torch.eye(2, dtype=torch.float64)
            pattern = torch.block_diag(*(kept if sign > 0 else kept.flip(0) for sign in s))
            middle = down @ pattern @ up
        else:
            slopes = low + (high - low) * torch.rand(10, dtype=torch.float64)
            s = (2 * slopes - low - high) / (high - low)
            middle = down @ torch.diag(slopes) @ up
        expected = 0.3 * torch.eye(8).double() + 0.7 * middle
        found = form.c_CC + form.b_CN @ torch.diag(s) @ form.g_NC
        assert torch.allclose(found, expected, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_bound_exceeds_every_sign_pattern(build_model: BuildModel, activation: str) -> None:
    """Oracle: SVD of C + B S G for 200 random S and 5 random positive multiplier vectors."""
    model = build_model(**TINY_MODEL, activation=activation)
    layer, mlp = model.config.layer(0), model.layers[0].mlp
    form = mlp_form(mlp.up.weight, mlp.down.weight, layer)
    count = form.b_CN.shape[1]
    s_MN = torch.rand(200, count, dtype=torch.float64) * 2 - 1
    s_MN[:100] = s_MN[:100].sign()
    worst = float(
        torch.linalg.matrix_norm(form.c_CC + form.b_CN * s_MN[:, None, :] @ form.g_NC, 2).max()
    )
    for spread in (0.0, 0.5, 1.0, 2.0, 5.0):
        lambda_N = (spread * torch.randn(count, dtype=torch.float64)).exp()
        assert mlp_bound(form, lambda_N)[0] >= worst


def test_mlp_bound_is_the_formula_rounded_up(build_model: BuildModel) -> None:
    """Oracle: eigvalsh of K(lambda); the eigenvalue margin is 1e-9."""
    model = build_model()
    mlp = model.layers[0].mlp
    form = mlp_form(mlp.up.weight, mlp.down.weight, model.config.layer(0))
    lambda_N = torch.rand(form.b_CN.shape[1], dtype=torch.float64) + 0.1
    x = form.g_NC.T @ (lambda_N[:, None] * form.g_NC)
    y = form.b_CN @ (form.b_CN / lambda_N).T
    k = torch.cat((torch.cat((x, form.c_CC.T), 1), torch.cat((form.c_CC, y), 1)))
    exact = float(torch.linalg.eigvalsh(k)[-1])
    bound, margin = mlp_bound(form, lambda_N)
    assert exact < bound < exact * (1 + TIGHT)
    assert 0 < margin < TIGHT


def test_mlp_bound_is_invariant_under_rotations_of_the_stream(build_model: BuildModel) -> None:
    """Oracle: the norm does not see an orthogonal change of basis."""
    model = build_model()
    mlp, layer = model.layers[0].mlp, model.config.layer(0)
    lambda_N = torch.rand(layer.mlp_width, dtype=torch.float64) + 0.1
    u, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    plain = mlp_bound(mlp_form(mlp.up.weight, mlp.down.weight, layer), lambda_N)[0]
    turned = mlp_bound(mlp_form(mlp.up.weight @ u.T, u @ mlp.down.weight, layer), lambda_N)[0]
    assert turned == pytest.approx(plain, rel=TIGHT)


def test_a_pruned_neuron_costs_nothing(build_model: BuildModel) -> None:
    """Oracle: deleting a neuron whose output column is zero gives the same bound."""
    model = build_model(activation="relu")
    mlp, layer = model.layers[0].mlp, model.config.layer(0)
    down = mlp.down.weight.clone()
    down[:, 3] = 0
    lambda_N = torch.rand(layer.mlp_width, dtype=torch.float64) + 0.1
    lambda_N[3] = 1e-30
    keep = torch.arange(layer.mlp_width) != 3
    whole = mlp_bound(mlp_form(mlp.up.weight, down, layer), lambda_N)[0]
    cut = mlp_bound(mlp_form(mlp.up.weight[keep], down[:, keep], layer), lambda_N[keep])[0]
    assert whole == pytest.approx(cut, rel=TIGHT)


def test_proofs_bound_random_jacobians(any_model: LipschitzTransformer) -> None:
    """Oracle: forward differences of the real blocks at random points of the ball."""
    radius = any_model.domain_radius()
    for index in range(2 * any_model.config.layers):
        layer = any_model.layers[index // 2]
        block = layer.mlp_block if index % 2 else layer.attend_block
        proved = _prove(any_model, index, radius)
        x = torch.randn(20, 8, any_model.config.width, dtype=torch.float64)
        x *= radius / x.norm(dim=-1, keepdim=True)
        y = x + 1e-4 * torch.randn_like(x)
        y *= (radius / y.norm(dim=-1, keepdim=True)).clamp(max=1)
        moved = (block(x) - block(y)).norm(dim=-1).amax(-1)
        ratio = float((moved / (x - y).norm(dim=-1).amax(-1)).max())
        assert ratio <= proved.tightened * (1 + 1e-9)
        assert float(block(x).norm(dim=-1).max()) <= proved.radius_out
        assert proved.tightened <= proved.naive
        assert proved.radius_out <= proved.naive_radius_out


def test_one_head_bound_is_below_the_classical_one(build_model: BuildModel) -> None:
    """Oracle: |Wo||Wv|(1 + 2 s |Wq||Wk|), valid for one head; both values enclose an attack."""
    model = build_model(heads=1, norm=1.7)
    layer, attention = model.config.layer(0), model.layers[0].attention
    heads = split_heads(attention.state_dict(), layer)
    radius = model.domain_radius()
    norms = [
        float(torch.linalg.matrix_norm(getattr(attention, name).weight, 2))
        for name in ("output", "value", "query", "key")
    ]
    score = layer.logit_scale * radius**2
    classical = norms[0] * norms[1] * (1 + 2 * score * norms[2] * norms[3])
    assert naive_attention(heads, layer, radius) <= classical * (1 + TIGHT)
    certificate = certify(model)
    found = certificate.blocks[0].components["lipschitz"]
    assert found <= classical * (1 + TIGHT)


def test_attention_bound_equals_its_formula(build_model: BuildModel) -> None:
    """Oracle: the formula of the docstring written with dense head matrices."""
    model = build_model(kv_heads=2, content_heads=2, position_bias=True)
    layer, attention = model.config.layer(0), model.layers[0].attention
    heads, radius = split_heads(attention.state_dict(), layer), 3.0
    m = _random_multipliers(model, 0, 0.5)
    score = layer.logit_scale * radius**2
    tau, joint, query, key = torch.zeros(4, 16, 16, dtype=torch.float64)
    wq_HDC, wk_DC = attention.query.weight.view(2, 4, 16), attention.key.weight
    wv_KDC, wo_CHD = attention.value.weight.view(2, 4, 16), attention.output.weight.view(16, 4, 4)
    for h in range(4):
        through = wo_CHD[:, h] @ wv_KDC[h // 2]
        value = through @ through.T
        tau += value / m["domain.value"][h]
        joint += value / m["value"][h]
        if h < 2:
            size = torch.linalg.matrix_norm(wk_DC, 2) ** 2
            seen = wk_DC @ through.T
            t = m["mixed"][h]
            mixed = ((1 + t) * size * value + (1 + 1 / t) * seen.T @ seen) / 4 * radius**2
            joint += score * (mixed / m["query"][h] + size * value / m["key"][h])
            query += m["query"][h] * wq_HDC[h].T @ wq_HDC[h]
            key += m["key"][h] * wq_HDC[h].T @ wq_HDC[h]
    tops = [float(torch.linalg.eigvalsh(matrix)[-1]) for matrix in (tau, joint, query, key)]
    scores = layer.logit_scale * tops[2] + score * tops[3]
    exact = (tops[1] + float(m["value"].sum()) + scores) / 2
    found = attention_bound(heads, layer, Ellipsoid.ball(16, radius), m)
    assert exact < found < exact * (1 + TIGHT)
    own = {"value": m["domain.value"]}
    assert value_path(heads, own) == pytest.approx(
        math.sqrt(float(own["value"].sum()) * tops[0]), rel=TIGHT
    )


@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_attention_bounds_grow_with_each_matrix(build_model: BuildModel, name: str) -> None:
    """Oracle: monotonicity in the norm of every matrix, for fixed multipliers."""
    model = build_model()
    layer, attention = model.config.layer(0), model.layers[0].attention
    m, radius = _random_multipliers(model, 0, 0.3), model.domain_radius()
    before = split_heads(copy.deepcopy(attention).state_dict(), layer)
    getattr(attention, name).weight.mul_(1.1)
    after = split_heads(attention.state_dict(), layer)
    assert naive_attention(after, layer, radius) > naive_attention(before, layer, radius)
    domain = Ellipsoid.ball(16, radius)
    pair = [attention_bound(heads, layer, domain, m) for heads in (before, after)]
    assert pair[1] > pair[0]
    assert naive_attention(after, layer, 2 * radius) > naive_attention(after, layer, radius)


def test_head_norms(build_model: BuildModel) -> None:
    """Oracle: SVD and the explicit largest row distance; chunks and the cheap form included."""
    model = build_model(vocab_size=600, final_scale=1.5)
    head = model.head.weight
    norm, pair = head_norms(model.config, head)
    assert norm == pytest.approx(1.5 * float(torch.linalg.matrix_norm(head, 2)), rel=TIGHT)
    assert pair == pytest.approx(1.5 * float(torch.cdist(head, head).max()), rel=1e-6)
    assert pair >= 1.5 * float((head[:, None] - head[None]).norm(dim=-1).max())


def test_tokens_that_shrink_below_all_numbers_come_back(build_model: BuildModel) -> None:
    """Oracle: matrices that scale every token by a power; the last tokens are the first ones."""
    fields = {"heads": 1, "content_heads": 0, "attn_factor": 1.0, "activation": "relu"}
    residuals = {"attn_residual": 1.0, "mlp_residual": 1.0, "width": 2, "mlp_width": 2}
    model = build_model(layers=4, **fields, **residuals)
    eye = torch.eye(2, dtype=torch.float64)
    for layer, power in zip(model.layers, (1e-70, 1e-70, 1e70, 1e70), strict=True):
        matrices = (layer.attention.value, layer.attention.output, layer.mlp.up, layer.mlp.down)
        for matrix in matrices:
            matrix.weight.copy_(power * eye)
    last = certify(model, tighten=False).blocks[-1]
    assert last.radius_out >= model.domain_radius()
    assert last.naive_radius_out >= model.domain_radius()


def test_biases_so_small_that_squares_underflow_are_refused(build_model: BuildModel) -> None:
    """Oracle: the norm of such a bias, which float64 computes as 0."""
    model = build_model(mlp_bias=True, layers=1)
    model.layers[0].mlp.up.bias.fill_(1e-200)
    with pytest.raises(CertificateError, match="bias: expected entries"):
        certify(model, tighten=False)


def test_the_value_at_zero_of_unequal_pairs() -> None:
    """Oracle: the smaller of a pair as it is; sum and difference would round it to 0."""
    fields = {"activation": "maxmin", "mlp_bias": True, "mlp_width": 2, "mlp_residual": 1.0}
    config = ModelConfig(vocab_size=3, width=2, layers=1, heads=1, context=2, **fields)
    tensors = {
        "up.bias": torch.tensor([1.0, 1e-20], dtype=torch.float64),
        "down.weight": torch.tensor([[0.0, 1e30], [0.0, 0.0]], dtype=torch.float64),
        "down.bias": torch.zeros(2).double(),
    }
    found = value_at_zero(tensors, config.layer(0))
    assert float(found.mid.norm() + found.error) >= 1e10 * (1 - 1e-15)
