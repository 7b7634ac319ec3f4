"""Operations counted from shapes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.adapters import LipschitzAdapter
from compress.flops import token_flops

SHAPES = [
    {},
    {"heads": 4, "kv_heads": 2, "head_dim": 6},
    {"mlp_width": (4, 40), "vocab_multiple": 16},
    {"attn_residual": (0.0, 0.5), "mlp_residual": (0.5, 0.0)},
]


@pytest.mark.parametrize("changes", SHAPES, ids=["plain", "grouped", "uneven", "idle"])
@pytest.mark.parametrize("length", [16, 5])
def test_forward_pass_against_the_counter(make_model, changes, length):
    """Oracle: torch's counter, which counts every query with every key where attention is plain."""
    model = make_model("gelu", **changes)
    tokens_BT = torch.zeros(3, length, dtype=torch.long)
    plain, counting = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.no_grad(), plain, counting as counter:
        model(tokens_BT)
    assert token_flops(model.config, keys=length) * 3 * length == counter.get_total_flops()


@pytest.mark.parametrize("content_heads", [4, 2, 0])
def test_targets_and_the_rest_add_up(make_model, content_heads):
    """Oracle: what all targets together say disappears; the head stays, and nothing else does."""
    model = make_model("maxmin", heads=4, kv_heads=2, head_dim=4, content_heads=content_heads)
    targets = LipschitzAdapter(model).targets()
    gone = sum(target.flops * target.components for target in targets)
    config = model.config
    assert token_flops(config) - gone == pytest.approx(2 * config.width * config.head_rows)


def test_a_cut_saves_what_its_target_says(make_model):
    """Oracle: ``Target.flops`` times the removed components."""
    adapter = LipschitzAdapter(make_model("gelu"))
    target = adapter.find("layers.1.mlp")
    small = adapter.cut({target.name: torch.arange(10)})
    saved = token_flops(adapter.model.config) - token_flops(small.config)
    assert saved == target.flops * (target.components - 10)
