"""Changes of MLP blocks at the same input against attacks and closed forms."""

import pytest
import torch

from common.models.config import ACTIVATIONS
from compress.compensate import METHODS
from compress.deviation.mlp import branch_bound, mlp_delta

TIGHT = 1.02
"""A linear branch without biases has an exact answer; the bound may exceed it by rounding only."""


@pytest.mark.parametrize(
    ("activation", "comp", "bias"),
    [
        *((activation, "lsq_capped", bias) for activation in ACTIVATIONS for bias in (True, False)),
        *(("maxmin", comp, True) for comp in METHODS if comp != "lsq_capped"),
    ],
)
def test_no_input_moves_a_block_by_more_than_its_delta(
    pruned_pair, ascend, on_sphere, activation, comp, bias
):
    """Oracle: gradient ascent on the change of the block over the ball, many starts at once."""
    dense, _, pruning = pruned_pair(activation, comp, bias=bias)
    old, new = dense.layers[0], pruning.model.layers[0]
    for radius in (0.3, 4.0):
        delta = mlp_delta(old.mlp, new.mlp, pruning.kept["layers.0.mlp"], radius)

        def change(x, old=old, new=new):
            return (old.mlp_block(x) - new.mlp_block(x)).norm(dim=-1).max()

        assert 0 < ascend(change, on_sphere((32, 8), radius), radius) <= delta


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_bound_is_exact_where_the_branch_is_linear(make_model, activation):
    """Oracle: largest singular value, for biases that keep every neuron on one side."""
    mlp = make_model(activation).layers[0].mlp
    with torch.no_grad():
        mlp.up.bias.fill_(50.0)
        mlp.down.bias.copy_(-mlp.down.weight @ mlp.up.bias)
        linear = mlp.layer.mlp_residual * mlp.down.weight @ mlp.up.weight
        expected = float(torch.linalg.matrix_norm(linear, 2))
    tensors = {name: tensor.detach() for name, tensor in mlp.state_dict().items()}
    assert expected <= branch_bound(tensors, mlp.layer, 1.0) <= TIGHT * expected


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_delta_grows_with_the_radius(pruned_pair, activation):
    """Property: a larger domain never has a smaller bound, at closed-form multipliers."""
    dense, _, pruning = pruned_pair(activation)
    old, new = dense.layers[0].mlp, pruning.model.layers[0].mlp
    radii = (0.0, 0.1, 0.5, 1.0, 2.0, 8.0)
    kept_K = pruning.kept["layers.0.mlp"]
    deltas = [mlp_delta(old, new, kept_K, radius, max_evals=0) for radius in radii]
    assert deltas == sorted(deltas)
    assert deltas[-1] > deltas[1]


def test_more_effort_never_hurts(pruned_pair):
    """Multiplier search starts from the closed forms, so it can only lower the bound."""
    dense, _, pruning = pruned_pair("gelu")
    old, new = dense.layers[0].mlp, pruning.model.layers[0].mlp
    quick, slow = (
        mlp_delta(old, new, pruning.kept["layers.0.mlp"], 2.0, max_evals=evals) for evals in (0, 60)
    )
    assert slow <= quick * (1 + 1e-9)
