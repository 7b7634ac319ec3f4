"""Bounds around one sequence against exact Jacobians, attacks and extended precision."""

# Legend: T token, C width, V vocabulary.

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.certificate import Certificate, config_sha256, tensors_sha256
from common.models import LipschitzTransformer
from solvers.bounds import certify
from solvers.bounds.local.chain import Neighbourhood
from solvers.bounds.network import TightenSettings

ROUNDING = 1e-9  # of float64 Jacobians and forward passes in these tests
QUICK = TightenSettings(max_evals=0)
TOKENS = torch.tensor([3, 0, 7, 7, 10])
CERTIFICATES: dict[str, Certificate] = {}

BuildModel = Callable[..., LipschitzTransformer]


def certified(model: LipschitzTransformer) -> Certificate:
    """Return a quick certificate; one per model, however many tests use it."""
    key = config_sha256(model.config) + str(tensors_sha256(model.state_dict()))
    if key not in CERTIFICATES:
        CERTIFICATES[key] = certify(model, settings=QUICK)
    return CERTIFICATES[key]


def around(model: LipschitzTransformer, tokens: Tensor = TOKENS) -> Neighbourhood:
    """Return the neighbourhood of a sequence with the multipliers of a quick certificate."""
    certificate = certified(model)
    multipliers = dict(certificate.multipliers)
    for index in range(1, 2 * model.config.layers, 2):
        multipliers[f"local.{index}.lambda"] = multipliers[f"blocks.{index}.lambda"]
    return Neighbourhood(model.config, model.state_dict(), multipliers, tokens, certificate.radius)


def logits(model: LipschitzTransformer, x_TC: Tensor) -> Tensor:
    """Return the model's logits (T, V) of embedded tokens."""
    return model.logits(model.stream(x_TC[None]))[0]


def rates(model: LipschitzTransformer, near: Neighbourhood, x_TC: Tensor) -> Tensor:
    """Return, per token and class, the exact Lipschitz constant at a point of ``z_top - z_v``."""
    jacobian = torch.autograd.functional.jacobian(lambda x: logits(model, x), x_TC)
    found = []
    for t, top in enumerate(near.top_T.tolist()):
        found.append((jacobian[t, top] - jacobian[t]).norm(dim=-1).sum(-1))
    return torch.stack(found)


def perturbed(x_TC: Tensor, epsilon: float, scale: float = 1.0) -> Tensor:
    """Return the tokens moved by ``scale * epsilon`` each, in random directions."""
    move_TC = torch.randn_like(x_TC)
    return x_TC + scale * epsilon * move_TC / move_TC.norm(dim=-1, keepdim=True)


def ascend(model: LipschitzTransformer, x_TC: Tensor, weight_TV: Tensor, epsilon: float) -> Tensor:
    """Return tokens within ``epsilon`` (l2 each) at which ``sum weight * logits`` is large."""
    move_TC = perturbed(torch.zeros_like(x_TC), epsilon)
    for _ in range(12):
        with torch.enable_grad():
            y_TC = (x_TC + move_TC).requires_grad_()
            value = (weight_TV * logits(model, y_TC)).sum()
            (gradient_TC,) = torch.autograd.grad(value, y_TC)
        move_TC = move_TC + 0.5 * epsilon * torch.nn.functional.normalize(gradient_TC, dim=-1)
        move_TC = move_TC * (epsilon / move_TC.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    return x_TC + move_TC


def test_computed_logits_are_the_models(any_model: LipschitzTransformer) -> None:
    """Oracle: the model itself."""
    expected = any_model(TOKENS[None])[0]
    torch.testing.assert_close(around(any_model).logits_TV, expected, rtol=0, atol=1e-12)


def test_the_limit_is_the_exact_rate(any_model: LipschitzTransformer) -> None:
    """Oracle: the Jacobian of the whole network, in the norm dual to the largest token."""
    near = around(any_model)
    level = near.level(1e-9, centred=False)
    exact_TV = rates(any_model, near, any_model.embed(TOKENS))
    for t, exact_V in enumerate(exact_TV):
        found_V = near.position(level, t).moved_KV[0]
        assert bool((found_V >= exact_V * (1 - ROUNDING)).all())
        torch.testing.assert_close(found_V, exact_V, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 3.0])
def test_jacobians_inside_stay_below_the_bound(
    any_model: LipschitzTransformer, epsilon: float
) -> None:
    """Oracle: exact Jacobians at random points of the ball, on its surface and inside."""
    near = around(any_model)
    level = near.level(epsilon, centred=False)
    bound_TV = torch.stack([near.position(level, t).moved_KV[0] for t in range(len(TOKENS))])
    x_TC = any_model.embed(TOKENS)
    for scale in (1.0, 1.0, 0.3):
        exact_TV = rates(any_model, near, perturbed(x_TC, epsilon, scale))
        assert bool((exact_TV <= bound_TV * (1 + ROUNDING)).all())


@pytest.mark.parametrize("epsilon", [0.03, 1.0])
def test_attacks_inside_stay_below_the_bound(
    any_model: LipschitzTransformer, epsilon: float
) -> None:
    """Oracle: gradient ascent on each logit difference; tokens move by at most epsilon each."""
    near = around(any_model)
    level = near.level(epsilon, centred=True)
    x_TC = any_model.embed(TOKENS)
    start_TV = logits(any_model, x_TC)
    reached = 0.0
    for t in range(len(TOKENS)):
        top, moved_KV = int(near.top_T[t]), near.position(level, t).moved_KV
        bound_V = moved_KV[0] * epsilon + moved_KV[1]
        for v in {0, 5, int(start_TV[t].argmin())} - {top}:
            weight_TV = torch.zeros_like(start_TV)
            weight_TV[t, v], weight_TV[t, top] = 1.0, -1.0
            y_TC = ascend(any_model, x_TC, weight_TV, epsilon)
            change = float((weight_TV * (logits(any_model, y_TC) - start_TV)).sum())
            assert change <= float(bound_V[v]) * (1 + ROUNDING)
            reached = max(reached, change / float(bound_V[v]))
    assert reached > (0.1 if epsilon < 0.1 else 0.0)  # the attack is not blind


def test_first_classes_survive_attacks_within_their_radius(
    any_model: LipschitzTransformer,
) -> None:
    """Oracle: gradient ascent towards the runner-up, from just inside the certified radius."""
    near = around(any_model)
    x_TC = any_model.embed(TOKENS)
    for epsilon in (0.1, 1.0):
        level = near.level(epsilon, centred=True)
        for t in range(len(TOKENS)):
            radius = near.radius_at(level, t)
            assert 0 <= radius <= epsilon
            if radius == 0:
                continue
            top, runner = logits(any_model, x_TC)[t].topk(2).indices.tolist()
            weight_TV = torch.zeros_like(near.logits_TV)
            weight_TV[t, runner], weight_TV[t, top] = 1.0, -1.0
            y_TC = ascend(any_model, x_TC, weight_TV, radius)
            assert int(logits(any_model, y_TC)[t].argmax()) == top


def test_never_worse_than_the_certificate(any_model: LipschitzTransformer) -> None:
    """Oracle: the certified constants, re-proved on the same ball."""
    near = around(any_model)
    for epsilon in (1e-3, 0.3, 30.0):
        level = near.level(epsilon, centred=False)
        largest = [float(size_KT[0].max()) for size_KT in level.sizes[1:]]
        for moved, certified in zip(largest, level.certified, strict=True):
            assert moved <= certified * (1 + ROUNDING)
        for t in range(len(TOKENS)):
            assert near.lipschitz(level, t) <= near.global_lipschitz(level, t)
            assert near.radius_at(level, t) >= near.global_radius(level, t)


def test_global_figures_are_those_of_the_certificate(build_model: BuildModel) -> None:
    """Oracle: the certificate's amplification, where the ball is not left."""
    model = build_model(content_heads=0, position_bias=True, activation="maxmin")
    near, certificate = around(model), certified(model)
    level = near.level(0.1, centred=True)
    assert level.certified[-1] == pytest.approx(certificate.amplification(-1), rel=1e-6)
    top = int(near.top_T[2])
    farthest = float((model.head.weight[top] - model.head.weight).norm(dim=1).max())
    assert near.global_lipschitz(level, 2) == pytest.approx(
        farthest * certificate.amplification(-1), rel=1e-6
    )


def test_bounds_grow_with_the_distance(any_model: LipschitzTransformer) -> None:
    """Oracle: a smaller ball is inside a larger one, which the search relies on."""
    near = around(any_model)
    for centred in (True, False):
        before = torch.zeros(1)
        for epsilon in (1e-6, 0.01, 0.1, 1.0):
            level = near.level(epsilon, centred=centred)
            moved = torch.stack([near.position(level, t).moved_KV[0] for t in range(5)])
            assert bool((moved >= before * (1 - 1e-6)).all())
            before = moved


def test_later_tokens_do_not_matter(build_model: BuildModel) -> None:
    """Oracle: causality; the constants of positional heads do not depend on the ball."""
    model = build_model(content_heads=0, position_bias=True)
    whole, prefix = around(model), around(model, TOKENS[:3])
    for t in range(3):
        moved = [near.position(near.level(0.2, centred=True), t) for near in (whole, prefix)]
        torch.testing.assert_close(moved[0].moved_KV, moved[1].moved_KV, rtol=1e-9, atol=1e-12)


def extended(model: LipschitzTransformer, tokens: Tensor) -> list[Any]:
    """Return the tokens before each block and after the last, in 80-bit arithmetic."""

    def exact(tensor: Tensor) -> Any:
        return tensor.numpy().astype(np.longdouble)

    config = model.config
    x = exact(model.embedding.weight)[tokens.numpy()]
    found = [x]
    for index in range(config.layers):
        layer, block = config.layer(index), model.layers[index]
        x = _attention(block.attention, layer, x, exact, np.longdouble(config.rope_theta))
        found.append(x)
        z = x @ exact(block.mlp.up.weight).T
        if layer.mlp_bias:
            z = z + exact(block.mlp.up.bias)
        if layer.activation == "maxmin":
            pairs = z.reshape(len(z), -1, 2)
            h = np.stack((pairs.max(-1), pairs.min(-1)), -1).reshape(z.shape)
        else:
            h = {"tanh": np.tanh(z), "silu": z / (1 + np.exp(-z)) / layer.gelu_divisor}[
                layer.activation
            ]
        y = h @ exact(block.mlp.down.weight).T
        if layer.mlp_bias:
            y = y + exact(block.mlp.down.bias)
        a = layer.mlp_residual
        x = (1 - np.longdouble(a)) * x + np.longdouble(a) * y
        found.append(x)
    return found


def _attention(module: Any, layer: Any, x: Any, exact: Any, theta: Any) -> Any:
    length, dim = len(x), layer.head_dim
    half = np.arange(0, dim, 2).astype(np.longdouble) / dim
    angle = np.arange(length)[:, None] * theta**-half
    cos, sin = np.cos(angle), np.sin(angle)

    def turned(y: Any) -> Any:
        first, second = y[:, : dim // 2], y[:, dim // 2 :]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), 1)

    heads = []
    for h in range(layer.heads):
        rows, kv_rows = slice(h * dim, (h + 1) * dim), h // layer.group
        kv_rows = slice(kv_rows * dim, (kv_rows + 1) * dim)
        s = np.zeros((length, length), dtype=np.longdouble)
        if h < layer.content_heads:
            q = turned(x @ exact(module.query.weight)[rows].T)
            k = turned(x @ exact(module.key.weight)[kv_rows].T)
            s = np.longdouble(layer.softmax_scale) / dim * (q @ k.T)
        if module.position_bias is not None:
            distance = np.arange(length)[:, None] - np.arange(length)
            s = s + exact(module.position_bias)[h][distance.clip(min=0)]
        p = np.where(np.tri(length) > 0, np.exp(s - s.max(1, keepdims=True)), 0)
        v = x @ exact(module.value.weight)[kv_rows].T
        heads.append((p / p.sum(1, keepdims=True)) @ v)
    mixed = np.concatenate(heads, 1) @ exact(module.output.weight).T
    a = np.longdouble(layer.attn_residual)
    return (1 - a) * x + a * np.longdouble(layer.attn_factor) * mixed


@pytest.mark.parametrize(
    "fields",
    [
        {"activation": "silu", "mlp_bias": True, "softmax_scale": 30.0},
        {"activation": "maxmin", "kv_heads": 2, "content_heads": 2, "position_bias": True},
        {"activation": "tanh", "heads": 1, "attn_residual": 1.0, "mlp_residual": 1.0},
    ],
)
def test_rounding_of_the_forward_pass_is_covered(
    build_model: BuildModel, fields: dict[str, Any]
) -> None:
    """Oracle: 80-bit arithmetic, with 2000 times less rounding; the allowance stays small."""
    model = build_model(norm=2.0, **fields)
    near = around(model)
    level = near.level(1e-9, centred=True)
    last = level.sizes[-1][1]
    exact = extended(model, TOKENS)
    for index, size_KT in enumerate(level.sizes):
        computed = near._tokens[index].numpy().astype(np.longdouble)
        error_T = np.sqrt(((computed - exact[index]) ** 2).sum(1)).astype(float)
        assert bool((torch.from_numpy(error_T) <= size_KT[1]).all())
    assert 0 < float(last.max()) < 1e-8
