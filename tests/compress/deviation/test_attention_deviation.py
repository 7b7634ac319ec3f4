"""Changes of attention blocks at the same input against attacks and exact cases."""

import pytest
import torch

from compress.deviation.attention import attention_delta
from solvers.bounds.ellipsoid import Ellipsoid, Tokens

TIGHT = 1.02
LAYOUTS = {
    "content": {"heads": 4},
    "positional": {"heads": 4, "content_heads": 0},
    "mixed": {"heads": 4, "content_heads": 2},
    "grouped": {"heads": 4, "kv_heads": 2},
    "grouped_mixed": {"heads": 4, "kv_heads": 2, "content_heads": 2},
    "no_bias_table": {"heads": 4, "position_bias": False},
    "wide_heads": {"heads": 3, "head_dim": 6, "softmax_scale": 20.0},
}


def ball(radius: float, width: int = 8) -> Tokens:
    """Return tokens of that l2 norm at most."""
    return Tokens.ball(width, radius)


def sharp(model):
    """Give the position biases something to say: heads that look at single tokens."""
    with torch.no_grad():
        for layer in model.layers:
            if layer.attention.position_bias is not None:
                layer.attention.position_bias *= 30
    return model


@pytest.mark.parametrize("comp", ["none", "lsq_capped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sequence_moves_a_block_by_more_than_its_delta(
    pruned_pair, ascend, on_sphere, layout, comp
):
    """Oracle: gradient ascent over whole sequences of tokens in the ball."""
    dense, _, pruning = pruned_pair("relu", comp, keep=1.0, keep_heads=0.5, **LAYOUTS[layout])
    old, new = sharp(dense).layers[0], sharp(pruning.model).layers[0]
    kept_K = pruning.kept["layers.0.heads"]
    for radius in (0.3, 4.0):

        def change(x, old=old, new=new):
            return (old.attend_block(x) - new.attend_block(x)).norm(dim=-1).max()

        found = ascend(change, on_sphere((16, 12, 8), radius), radius)
        for evals in (0, 20):
            delta = attention_delta(
                old.attention, new.attention, kept_K, ball(radius), max_evals=evals
            )
            assert 0 < found <= delta


def test_one_head_with_orthogonal_values_is_exact(make_model):
    """Oracle: ``a f R |E V|``, which sequences of one repeated token reach."""
    dense = make_model("relu", heads=1)
    changed = make_model("relu", heads=1)
    old, new = dense.layers[0], changed.layers[0]
    with torch.no_grad():
        old.attention.value.weight.copy_(torch.linalg.qr(old.attention.value.weight)[0])
        changed.load_state_dict(dense.state_dict())
        new.attention.output.weight.mul_(0.4)
        # The repeated token is the worst direction of E V.
        error_CC = 0.6 * old.attention.output.weight @ old.attention.value.weight
        _, sizes, right_CC = torch.linalg.svd(error_CC)
        x_BTC = 3.0 * right_CC[0].expand(1, 5, 8)
        reached = float((old.attend_block(x_BTC) - new.attend_block(x_BTC)).norm(dim=-1).max())
    delta = attention_delta(old.attention, new.attention, torch.arange(8), ball(3.0))
    layer = old.layer
    assert reached == pytest.approx(layer.attn_residual * layer.attn_factor * 3 * float(sizes[0]))
    assert reached <= delta <= TIGHT * reached


def test_one_removed_head_is_exact(pruned_pair):
    """Oracle: the norm of the removed head's own value path, reached by one repeated token."""
    dense, _, pruning = pruned_pair("relu", "none", keep=1.0, keep_heads=0.5, heads=2)
    old, new = dense.layers[0], pruning.model.layers[0]
    kept_K = pruning.kept["layers.0.heads"]
    gone_K = torch.tensor([index for index in range(8) if index not in kept_K.tolist()])
    with torch.no_grad():
        path_CC = old.attention.output.weight[:, gone_K] @ old.attention.value.weight[gone_K]
        right_CC = torch.linalg.svd(path_CC)[2]
        x_BTC = 2.0 * right_CC[0].expand(1, 5, 8)
        reached = float((old.attend_block(x_BTC) - new.attend_block(x_BTC)).norm(dim=-1).max())
    delta = attention_delta(old.attention, new.attention, kept_K, ball(2.0))
    assert reached <= delta <= TIGHT * reached


def test_delta_is_linear_in_the_radius_of_a_ball(pruned_pair):
    """Property: the change is positively homogeneous in the tokens' set."""
    dense, _, pruning = pruned_pair("relu", keep=1.0, keep_heads=0.5, heads=4)
    old, new = dense.layers[0].attention, pruning.model.layers[0].attention
    kept_K = pruning.kept["layers.0.heads"]
    one, three = (attention_delta(old, new, kept_K, ball(r), max_evals=0) for r in (1.0, 3.0))
    assert three == pytest.approx(3 * one, rel=1e-6)


def test_flat_domains_have_smaller_deltas(pruned_pair, on_sphere):
    """Oracle: random repeated tokens of the ellipsoid; a subset of the ball has less to offer."""
    dense, _, pruning = pruned_pair("relu", keep=1.0, keep_heads=0.5, heads=4)
    old, new = dense.layers[0], pruning.model.layers[0]
    kept_K = pruning.kept["layers.0.heads"]
    shape_CC = torch.diag(torch.logspace(0, -3, 8, dtype=torch.float64))
    flat = Tokens(Ellipsoid(shape_CC, 1, 1.0), 2.0, 2.0)
    delta = attention_delta(old.attention, new.attention, kept_K, flat)
    x_BTC = (2 * on_sphere((500, 1, 8), 1.0) @ shape_CC).expand(-1, 3, -1)
    moved = float((old.attend_block(x_BTC) - new.attend_block(x_BTC)).detach().norm(dim=-1).max())
    whole = attention_delta(old.attention, new.attention, kept_K, ball(2.0))
    assert 0 < moved <= delta < 0.9 * whole


@pytest.mark.parametrize("change", ["nothing", "no_residual"])
def test_no_effect_means_no_delta(make_model, change):
    """Everything kept as it was, or a block that is skipped: exactly 0."""
    fields = {"attn_residual": 0.0} if change == "no_residual" else {}
    dense, changed = make_model("relu", **fields), make_model("relu", **fields)
    if change == "no_residual":
        with torch.no_grad():
            changed.layers[0].attention.output.weight.mul_(2)
    old, new = dense.layers[0].attention, changed.layers[0].attention
    assert attention_delta(old, new, torch.arange(8), ball(1.0)) == 0.0
