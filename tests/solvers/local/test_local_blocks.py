"""Single blocks around computed tokens: each path of each bound against what moved tokens do."""

# Legend: T token, N neurons or pairs, D head width, H heads.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer
from common.models.config import ACTIVATIONS
from solvers.bounds.local.attention import attention_rows, attention_spread
from solvers.bounds.local.attention_centre import (
    AttentionCentre,
    attention_centre,
    attention_map,
    probabilities,
)
from solvers.bounds.local.blocks import around
from solvers.bounds.local.mlp import mlp_centre, mlp_map, mlp_rows, mlp_slopes

ROUNDING = 1e-9
COUNT = 6
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 2, "norm": 1.5},
    "grouped": {"kv_heads": 2, "content_heads": 2, "position_bias": True, "softmax_scale": 3.0},
    "one": {"heads": 1, "softmax_scale": 8.0},
}

BuildModel = Callable[..., LipschitzTransformer]


def moved(x_TC: Tensor, reach_T: Tensor, scale: float = 1.0) -> Tensor:
    """Return tokens moved by ``scale * reach`` each, in random directions."""
    move_TC = torch.nn.functional.normalize(torch.randn_like(x_TC), dim=-1)
    return x_TC + scale * reach_T[:, None] * move_TC


def _tokens(model: LipschitzTransformer) -> Tensor:
    return model.embed(torch.tensor([1, 4, 4, 9, 0, 2]))


def _parts(centre: AttentionCentre, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, exactly, probabilities, the covariance of values and keys, and the key path.

    The key path's matrix of query i and key j is ``p_j (v_j - mean v) q_i^T``.
    """
    p_IT, q_ID, k_TD, v_TD = (
        part[h] for part in (centre.weight_HIT, centre.q_HTD, centre.k_HTD, centre.v_HTD)
    )
    far_ITD = v_TD - (p_IT @ v_TD)[:, None]
    covariance = torch.einsum("ij,ijd,je->ide", p_IT, far_ITD, k_TD)
    return p_IT, covariance, torch.einsum("ij,ijd,ie->ijde", p_IT, far_ITD, q_ID)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_each_path_of_attention_stays_within_its_remainder(
    build_model: BuildModel, name: str, size: float
) -> None:
    """Oracle: probabilities, covariances and key paths recomputed at moved tokens.

    Every bound holds, and is within a factor of what random movements of the tokens reach.
    """
    model = build_model(**HEADS[name])
    layer, x_TC = model.config.layer(0), _tokens(model)
    block = attention_map(model.layers[0].attention.state_dict(), layer, model.config)
    centre, reach_T = attention_centre(block, x_TC), size * torch.rand(COUNT).double()
    spread = attention_spread(block, centre, reach_T)
    reached = torch.zeros(3)
    for trial in range(60):
        found = attention_centre(block, moved(x_TC, reach_T, 1.0 if trial % 3 else 0.5))
        for h in range(layer.content_heads):
            old, new = _parts(centre, h), _parts(found, h)
            bounds = (
                spread.moved_HIT[h],
                spread.query_HI[h] / block.q_norm_H[h] / layer.logit_scale,
                spread.key_HIT[h] / block.k_norm_H[h] / layer.logit_scale,
            )
            changes = (
                (new[0] - old[0]).abs(),
                torch.linalg.matrix_norm(new[1] - old[1], 2),
                torch.linalg.matrix_norm(new[2] - old[2], 2),
            )
            assert bool((new[0] <= spread.weight_HIT[h] + ROUNDING).all())
            for path, (change, bound) in enumerate(zip(changes, bounds, strict=True)):
                assert bool((change <= bound * (1 + ROUNDING)).all())
                ratio = float((change / bound.clamp(min=1e-6)).max())
                reached[path] = max(float(reached[path]), ratio)
    assert bool((reached > 0.02).all()), reached


def test_probabilities_are_bounded_and_the_bounds_attained() -> None:
    """Oracle: softmax of logits moved by their bounds, one up and the others down."""
    logits = 2 * torch.randn(1, 5, 5, dtype=torch.float64)
    mask = torch.ones(5, 5).tril().bool()
    shift = torch.rand(1, 5, 5).double() * mask
    weight = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    upper, movement = probabilities(weight, shift)
    for j in range(5):
        direction = torch.full((5,), -1.0).double()
        direction[j] = 1.0
        for sign in (1, -1):
            found = (logits + sign * shift * direction).masked_fill(~mask, -torch.inf).softmax(-1)
            assert bool((found <= upper + ROUNDING).all())
            assert bool(((found - weight).abs() <= movement + ROUNDING).all())
            if sign > 0:
                own = shift[0, j:, j] > 0
                assert bool(
                    (found[0, j:, j] * shift[0, j:, j].mul(2).exp() >= upper[0, j:, j])[own].all()
                )


def test_wild_logits_claim_nothing_about_probabilities() -> None:
    """Oracle: the trivial bounds, also where the computed probability is 0."""
    weight = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    shift = torch.tensor([[[0.0, 0.0], [1e5, 1e5]]], dtype=torch.float64)
    upper, movement = probabilities(weight, shift)
    assert upper[0, 1].tolist() == [1.0, 1.0]
    assert bool((movement[0, 1] >= 1.0).all())
    assert float(upper[0, 0, 1]) == 0.0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("centred", [True, False])
def test_slopes_of_an_mlp_hold_and_are_attained(
    build_model: BuildModel, activation: str, centred: bool
) -> None:
    """Oracle: outputs at tokens moved along the rows of the first matrix, neuron by neuron.

    ``f(y) - f(x) = (linear + outer diag(mid + s spread) inner)(y - x)`` with ``|s| <= 1``.
    """
    model = build_model(activation=activation, mlp_bias=True, mlp_residual=0.8, norm=1.5)
    layer, mlp = model.layers[0], model.layers[0].mlp
    block, x_TC = mlp_map(mlp.state_dict(), model.config.layer(0)), _tokens(model)
    centre, reach_T = mlp_centre(block, x_TC), 0.4 * torch.rand(COUNT).double() + 0.1
    torch.testing.assert_close(centre.out_TC, layer.mlp_block(x_TC), rtol=0, atol=1e-12)
    slopes = mlp_slopes(block, centre, reach_T, centred=centred)
    largest = 0.0
    for n in range(len(block.inner_NC)):
        row_C = torch.nn.functional.normalize(block.inner_NC[n], dim=0)
        sign = 1.0 if n % 2 else -1.0
        y_TC = x_TC + sign * reach_T[:, None] * row_C
        start_TC = x_TC if centred else moved(x_TC, reach_T)
        move_TC = y_TC - start_TC
        rest_TN, far_TN = (mlp_centre(block, z).rest_TN for z in (start_TC, y_TC))
        rise_TN = _psi(activation, far_TN, model) - _psi(activation, rest_TN, model)
        quotient_TN = rise_TN / (far_TN - rest_TN)
        usable = (far_TN - rest_TN).abs() > 1e-5
        s_TN = ((quotient_TN - slopes.mid_TN) / slopes.spread_TN.clamp(min=1e-7))[usable]
        assert float(s_TN.abs().max()) <= 1 + 1e-3
        largest = max(largest, float(s_TN.abs().max()))
        rebuilt = move_TC @ block.linear_CC.T + rise_TN @ block.outer_CN.T
        expected = layer.mlp_block(y_TC) - layer.mlp_block(start_TC)
        torch.testing.assert_close(rebuilt, expected, rtol=0, atol=1e-12)
    assert largest > 0.8


def _psi(activation: str, z_TN: Tensor, model: LipschitzTransformer) -> Tensor:
    if activation == "maxmin":
        return z_TN.abs()
    from common.models.layers import activate

    return activate(z_TN, model.config.layer(0))


@pytest.mark.parametrize("activation", ["maxmin", "relu", "gelu"])
def test_functionals_miss_no_more_than_the_remainder(
    build_model: BuildModel, activation: str
) -> None:
    """Oracle: sign patterns found by alternation, which maximise what is missing."""
    model = build_model(activation=activation, norm=1.5)
    block = mlp_map(model.layers[0].mlp.state_dict(), model.config.layer(0))
    x_TC = _tokens(model)
    slopes = mlp_slopes(
        block, mlp_centre(block, x_TC), torch.full((COUNT,), 1.0).double(), centred=False
    )
    rows_MTC = torch.randn(3, COUNT, 16, dtype=torch.float64)
    back_MTC, missing_MT = mlp_rows(block, slopes, rows_MTC)
    reached = 0.0
    for m in range(3):
        for t in range(COUNT):
            seen_N = (rows_MTC[m, t] @ block.outer_CN) * slopes.spread_TN[t]
            centre_C = rows_MTC[m, t] @ block.linear_CC
            centre_C = (
                centre_C + ((rows_MTC[m, t] @ block.outer_CN) * slopes.mid_TN[t]) @ block.inner_NC
            )
            torch.testing.assert_close(back_MTC[m, t], centre_C)
            s_N = torch.randn(len(seen_N)).double().sign()
            for _ in range(20):
                s_N = (seen_N * (block.inner_NC @ ((seen_N * s_N) @ block.inner_NC))).sign()
            lost = float(((seen_N * s_N) @ block.inner_NC).norm())
            assert lost <= float(missing_MT[m, t])
            reached = max(reached, lost / float(missing_MT[m, t]))
    assert reached > 0.3


def test_blocks_that_do_nothing_are_left_out(build_model: BuildModel) -> None:
    """Oracle: residual weight 0."""
    model = build_model(attn_residual=0.0, mlp_residual=0.0)
    for index in range(4):
        assert around(model.config, model.state_dict(), index, _tokens(model)) is None


def test_what_attention_rows_miss_is_the_sum_of_the_paths(build_model: BuildModel) -> None:
    """Oracle: the formula written with loops over heads, queries and keys."""
    model = build_model(kv_heads=2, content_heads=2, position_bias=True, attn_residual=0.7)
    layer, x_TC = model.config.layer(0), _tokens(model)
    block = attention_map(model.layers[0].attention.state_dict(), layer, model.config)
    centre = attention_centre(block, x_TC)
    spread = attention_spread(block, centre, torch.full((COUNT,), 0.2).double())
    rows_MIC, size_KT = torch.randn(2, 2, 16).double(), torch.rand(1, COUNT).double()
    _, missing_KM = attention_rows(block, centre, spread, rows_MIC, size_KT)
    for m in range(2):
        total = 0.0
        for i, row_C in zip((COUNT - 2, COUNT - 1), rows_MIC[m], strict=True):
            for h in range(4):
                gain = float(block.v_norm_H[h] * (spread.moved_HIT[h, i] @ size_KT[0]))
                if h < 2:
                    gain += float(spread.query_HI[h, i] * size_KT[0, i])
                    gain += float(spread.key_HIT[h, i] @ size_KT[0])
                total += gain * float((row_C @ block.o_HCD[h]).norm())
        expected = layer.attn_residual * layer.attn_factor * total
        assert expected <= float(missing_KM[0, m]) <= expected * (1 + 1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_attention_rows_are_the_gradient(build_model: BuildModel, name: str) -> None:
    """Oracle: automatic differentiation of the model's own block."""
    model = build_model(**HEADS[name])
    x_TC = _tokens(model)
    block = attention_map(
        model.layers[0].attention.state_dict(), model.config.layer(0), model.config
    )
    centre = attention_centre(block, x_TC)
    spread = attention_spread(block, centre, torch.zeros(COUNT).double())
    rows_MIC = torch.randn(2, 3, 16).double()
    back_MTC, missing_KM = attention_rows(
        block, centre, spread, rows_MIC, torch.ones(1, COUNT).double()
    )
    for m in range(2):
        y_TC = x_TC.clone().requires_grad_()
        value = (model.layers[0].attend_block(y_TC[None])[0, -3:] * rows_MIC[m]).sum()
        (gradient_TC,) = torch.autograd.grad(value, y_TC)
        torch.testing.assert_close(back_MTC[m], gradient_TC, rtol=0, atol=1e-11)
    assert float(missing_KM.max()) < 1e-6
