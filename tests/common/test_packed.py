"""The transformer's inference form against the transformer itself."""

import pytest
import torch
from torch import Tensor

from common.models import LipschitzTransformer, ModelConfig
from common.models.packed import PackedTransformer, stacked
from common.models.rope import inverse_frequencies, rotate, rotation, turn, turn_table

# Both sides run in float64 on a few dozen terms.
EXACT = 1e-12

FREEDOMS = {
    "paper": {},
    "some_positional": {"kv_heads": 2, "content_heads": 2, "position_bias": True},
    "all_positional": {"content_heads": 0, "position_bias": True, "activation": "abs"},
    "biases": {"mlp_bias": True, "head_bias": True, "activation": "maxmin", "kv_heads": 1},
    "uneven": {"heads": (4, 2), "kv_heads": (2, 2), "head_dim": (4, 6), "activation": "relu"},
    "constants": {"attn_residual": 0.0, "mlp_residual": 1.0, "attn_factor": 2.0, "rope_dims": 2},
    "padded_head": {"vocab_multiple": 8, "final_scale": 3.0, "mlp_ratio": 0.5},
}


def make(name: str) -> LipschitzTransformer:
    """Return a small float64 model, nowhere zero."""
    settings = {"vocab_size": 7, "width": 16, "layers": 2, "heads": 4, "context": 9}
    model = LipschitzTransformer(ModelConfig(**(settings | FREEDOMS[name]))).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def attention_of(model: LipschitzTransformer, rows: int):
    """Return the model's own attention arithmetic as a hook on a flat axis of equal windows."""

    def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        parts = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
        o_BHTD = model.layers[layer].attention._attend(*parts, None)
        return o_BHTD.transpose(1, 2).flatten(0, 1)

    return attend


@pytest.mark.parametrize("name", FREEDOMS)
def test_packed_equals_the_transformer(name: str) -> None:
    """Oracle: the transformer, before and after its weights moved."""
    model = make(name)
    tokens_BT = torch.randint(7, (3, 9))
    positions_N = torch.arange(9).repeat(3)
    with torch.no_grad():
        expected_NV = model(tokens_BT).flatten(0, 1)
        packed = PackedTransformer(model)
        found_NV = packed(tokens_BT.flatten(), positions_N, attention_of(model, 3))
        torch.testing.assert_close(found_NV, expected_NV, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(model(tokens_BT).flatten(0, 1), expected_NV, rtol=0, atol=EXACT)
        last_M = torch.tensor([26, 3, 3])
        some_MV = packed(tokens_BT.flatten(), positions_N, attention_of(model, 3), last_M)
        torch.testing.assert_close(some_MV, found_NV[last_M], rtol=EXACT, atol=EXACT)


def test_packing_keeps_weights_and_moves_them_once() -> None:
    """Oracle: the state before; storage addresses of a second packing."""
    model = make("paper")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = PackedTransformer(model), PackedTransformer(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one.qkv_OC.data_ptr() == other.qkv_OC.data_ptr()
        assert one.qkv_OC.data_ptr() == one.attention.query.weight.data_ptr()


def test_layout_follows_the_dtype() -> None:
    """Oracle: strides; only float32 matrices of more rows than columns lie column by column."""
    model = make("paper")
    for dtype, runs_down in [(torch.float32, True), (torch.bfloat16, False), (None, True)]:
        model = model.to(dtype or torch.float32)
        (first, _) = PackedTransformer(model).layers
        for weight in (first.qkv_OC, first.up):
            assert weight.stride() == ((1, len(weight)) if runs_down else (weight.shape[1], 1))
        assert first.attention.output.weight.is_contiguous()


def test_packing_sees_later_weights() -> None:
    """Oracle: the model, after an in-place change of its weights."""
    model = make("paper")
    packed = PackedTransformer(model)
    model.load_state_dict(make("paper").state_dict())
    tokens_T = torch.randint(7, (9,))
    with torch.no_grad():
        found_NV = packed(tokens_T, torch.arange(9), attention_of(model, 1))
        torch.testing.assert_close(found_NV, model(tokens_T[None])[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("gap", [0, 1], ids=["neighbours", "apart"])
@pytest.mark.parametrize("is_column_major", [False, True], ids=["rows", "columns"])
def test_stacked_recognises_neighbours(gap: int, is_column_major: bool) -> None:
    """Oracle: concatenation; neighbouring rows of one storage are not copied."""
    whole = torch.randn(9 + gap, 3)
    whole = whole.t().contiguous().t() if is_column_major else whole
    linears = [torch.nn.Linear(3, rows, bias=False) for rows in (4, 2, 3)]
    starts = [0, 4 + gap, 6 + gap]
    for linear, start in zip(linears, starts, strict=True):
        linear.weight.data = whole[start : start + linear.out_features]
    expected = torch.cat([linear.weight.detach() for linear in linears])
    found = stacked(linears)
    assert torch.equal(found, expected)
    assert (found.data_ptr() == whole.data_ptr()) == (gap == 0)
    assert all(
        torch.equal(linear.weight, part)
        for linear, part in zip(linears, expected.split([4, 2, 3]), strict=True)
    )


@pytest.mark.parametrize("rope_dims", [None, 4, 0])
def test_turn_equals_rotate(rope_dims: int | None) -> None:
    """Oracle: ``rotate`` by ``rotation``."""
    frequency = inverse_frequencies(8, 10000.0, rope_dims)
    positions_N = torch.tensor([0, 3, 9, 3])
    x_NAD = torch.randn(4, 5, 8, dtype=torch.float64)
    cos_sin = rotation(positions_N[:, None], frequency, torch.float64)
    expected = rotate(x_NAD[:, :, None], cos_sin)[:, :, 0]
    cos_ND, sin_ND = turn_table(10, frequency, torch.float64)[positions_N].unbind(1)
    found = turn(x_NAD, cos_ND[:, None], sin_ND[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
