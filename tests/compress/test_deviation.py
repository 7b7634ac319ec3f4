"""Certified deviations against attacks and special cases."""

import pytest
import torch

from common.errors import CertificateError
from common.models.config import ACTIVATIONS
from compress.compensate import METHODS
from compress.deviation import block_delta, branch_bound, certified_deviation
from compress.measure import measure_deviation
from compress.pruner import prune_model
from compress.record import make_report
from compress.settings import CompressConfig
from compress.surgery import shrink
from solvers.bounds import certify

ATTACK_STEPS = 40
TIGHT = 1.02
"""A linear branch without biases has an exact answer; the bound may exceed it by rounding only."""


def pruned_pair(make_model, activation, comp="lsq_capped", *, bias=True, keep=0.6, **changes):
    """Return a dense model, its certificate and a pruning of it."""
    model = make_model(activation, bias=bias, **changes)
    certificate = certify(model, tighten=False)
    tokens_BT = torch.randint(11, (24, 16), generator=torch.Generator().manual_seed(1))
    settings = CompressConfig(keep=keep, comp=comp, tokens=1, ridge=1e-4)
    return model, certificate, prune_model(model, certificate, tokens_BT, settings)


def ascend(objective, start, radius, steps=ATTACK_STEPS):
    """Return the largest objective that normalised gradient ascent in a ball of tokens finds."""
    x = start.clone().requires_grad_()
    best = 0.0
    for step in range(steps):
        value = objective(x)
        best = max(best, float(value.detach()))
        (gradient,) = torch.autograd.grad(value, x)
        rate = radius * 0.5 * (1 - step / steps)
        with torch.no_grad():
            x += rate * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            x *= (radius / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    return best


@pytest.mark.parametrize(
    ("activation", "comp", "bias"),
    [
        *((activation, "lsq_capped", bias) for activation in ACTIVATIONS for bias in (True, False)),
        *(("maxmin", comp, True) for comp in METHODS if comp != "lsq_capped"),
    ],
)
def test_no_input_moves_a_block_by_more_than_its_delta(make_model, activation, comp, bias):
    """Oracle: gradient ascent on the change of the block over the ball, many starts at once."""
    dense, _, pruning = pruned_pair(make_model, activation, comp, bias=bias)
    old, new = dense.layers[0], pruning.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    for radius in (0.3, 4.0):
        start = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        start *= radius / start.norm(dim=1, keepdim=True)
        delta = block_delta(old.mlp, new.mlp, pruning.kept[0], radius)

        def change(x, old=old, new=new):
            return (old.mlp_block(x) - new.mlp_block(x)).norm(dim=-1).max()

        found = ascend(change, start, radius)
        assert 0 < found <= delta


@pytest.mark.parametrize("activation", ["relu", "abs"])
def test_bound_is_exact_where_the_branch_is_linear(make_model, activation):
    """Oracle: largest singular value, for biases that keep every neuron on one side."""
    mlp = make_model(activation).layers[0].mlp
    with torch.no_grad():
        mlp.up.bias.fill_(50.0)
        mlp.down.bias.copy_(-mlp.down.weight @ mlp.up.bias)
        expected = float(torch.linalg.matrix_norm(mlp.down.weight @ mlp.up.weight, 2))
    tensors = {name: tensor.detach() for name, tensor in mlp.state_dict().items()}
    assert expected <= branch_bound(tensors, mlp.layer, 1.0) <= TIGHT * expected


@pytest.mark.parametrize("activation", ["gelu", "relu", "maxmin"])
def test_certified_logit_deviation_withstands_an_attack(make_model, activation):
    """Measured <= semi-empirical <= certified on text; ascent in the ball stays below certified."""
    dense, certificate, pruning = pruned_pair(make_model, activation)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate)
    tokens_BT = torch.randint(11, (8, 16), generator=torch.Generator().manual_seed(7))
    measured = measure_deviation(dense, pruning.model, tokens_BT)
    semi = deviation.certificate.logit_deviation(measured.deltas)
    assert 0 < measured.logits <= semi <= deviation.logits

    def change(x):
        moved = dense.logits(dense.stream(x)) - pruning.model.logits(pruning.model.stream(x))
        return moved.square().mean(-1).sqrt().max()

    start = dense.embed(tokens_BT).detach()
    start *= certificate.radius / start.norm(dim=-1, keepdim=True)
    found = ascend(change, start, certificate.radius, steps=40)
    assert measured.logits < found <= deviation.logits


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_pruned_streams_stay_within_the_reported_radii(make_model, activation):
    """Oracle: token norms along the pruned network, from inputs on the sphere of the domain."""
    dense, certificate, pruning = pruned_pair(make_model, activation, "lsq", keep=0.3)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 16, 8, generator=generator, dtype=torch.float64)
    x *= certificate.radius / x.norm(dim=-1, keepdim=True)
    seen = []
    with torch.no_grad():
        for layer in pruning.model.layers:
            seen.append(float(x.norm(dim=-1).max()))
            x = layer.attend_block(x)
            seen.append(float(x.norm(dim=-1).max()))
            x = layer.mlp_block(x)
    assert all(
        norm <= radius * (1 + 1e-12) for norm, radius in zip(seen, deviation.radii, strict=True)
    )


def test_attention_is_proved_again_where_pruned_tokens_leave_the_dense_ball(make_model):
    """A compensation that enlarges the tokens must not use constants of the smaller ball."""
    dense = make_model("relu", bias=False)
    certificate = certify(dense)
    everything = [torch.arange(32)] * 2
    larger = [3 * layer.mlp.down.weight.detach() for layer in dense.layers]
    pruned = shrink(dense, everything, larger)
    deviation = certified_deviation(dense, pruned, everything, certificate)
    old, new = certificate.blocks[2], deviation.certificate.blocks[2]
    assert deviation.radii[2] > old.radius_in
    assert new.radius_in == deviation.radii[2]
    assert new.tightened > old.tightened
    # Oracle: the constant is (1 - a) + a (c0 + c1 R^2), so it grows at most quadratically.
    a = dense.config.layer(1).attn_residual
    growth = (new.radius_in / old.radius_in) ** 2
    assert new.tightened <= (1 - a) + (old.tightened - (1 - a)) * growth * (1 + 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_change_means_no_deviation(make_model, activation):
    """Everything kept: all bounds are exactly 0 and the logits are bit-identical."""
    dense, certificate, pruning = pruned_pair(make_model, activation, keep=1.0)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate)
    assert deviation.logits == 0.0
    assert set(deviation.deltas) == {0.0}
    tokens_BT = torch.arange(32).reshape(2, 16) % 11
    assert measure_deviation(dense, pruning.model, tokens_BT).logits == 0.0
    assert torch.equal(dense(tokens_BT), pruning.model(tokens_BT))


def test_more_effort_never_hurts(make_model):
    """Multiplier search starts from the closed forms, so it can only lower the bound."""
    dense, certificate, pruning = pruned_pair(make_model, "gelu")
    quick, slow = (
        certified_deviation(dense, pruning.model, pruning.kept, certificate, max_evals=evals).logits
        for evals in (0, 60)
    )
    assert slow <= quick * (1 + 1e-9)


def test_a_changed_up_projection_is_refused(make_model):
    """The bound reads the down projections alone: other rows, or half a pair, are not covered."""
    dense, _, pruning = pruned_pair(make_model, "maxmin")
    old, new, kept_K = dense.layers[0].mlp, pruning.model.layers[0].mlp, pruning.kept[0]
    assert block_delta(old, new, kept_K, 1.0) > 0
    with pytest.raises(CertificateError, match="kept rows"):
        block_delta(old, new, kept_K.flip(0), 1.0)
    with torch.no_grad():
        new.up.bias[0] += 1e-6
    with pytest.raises(CertificateError, match="kept rows"):
        block_delta(old, new, kept_K, 1.0)


def test_changes_outside_the_mlps_are_refused(make_model):
    """The bound adds up the MLPs' changes: a moved head or another scale is not covered."""
    dense, certificate, pruning = pruned_pair(make_model, "relu")
    pruning.model.config = pruning.model.config.replace(final_scale=2.0)
    with pytest.raises(CertificateError, match="configuration"):
        certified_deviation(dense, pruning.model, pruning.kept, certificate)
    pruning.model.config = pruning.model.config.replace(final_scale=dense.config.final_scale)
    with torch.no_grad():
        pruning.model.head.weight[0, 0] += 1e-6
    with pytest.raises(CertificateError, match=r"head\.weight"):
        certified_deviation(dense, pruning.model, pruning.kept, certificate)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "layers.0.mlp.up.weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_all_zero_matrices_are_bounded_like_any_other(make_model, name, bias):
    """Measured <= certified where radii, head norm or activations vanish."""
    dense = make_model("maxmin", bias=bias)
    with torch.no_grad():
        dense.get_parameter(name).zero_()
    certificate = certify(dense, tighten=False)
    tokens_BT = torch.randint(11, (24, 16), generator=torch.Generator().manual_seed(1))
    settings = CompressConfig(keep=0.6, tokens=1)
    pruning = prune_model(dense, certificate, tokens_BT, settings)
    report = make_report(dense, certificate, pruning, tokens_BT, settings)
    assert report.measured_deviation <= report.certified_deviation < 10
    assert 0 <= report.certified_top1 <= report.top1_agreement
