"""Certified deviations of whole networks against attacks and special cases."""

import copy
import dataclasses

import pytest
import torch

from common.errors import CertificateError
from common.models.config import ACTIVATIONS
from compress.deviation.network import certified_deviation
from compress.deviation.text import measure_deviation
from compress.pruner import prune_model
from compress.record import make_report
from compress.settings import CompressConfig
from solvers.bounds import TightenSettings, certify

LAYOUT = {"heads": 4, "kv_heads": 2, "content_heads": 2}


def logit_change(dense, pruned):
    """Return the largest RMS change of a token's logits as a function of embedded tokens."""

    def change(x):
        moved = dense.logits(dense.stream(x)) - pruned.logits(pruned.stream(x))
        return moved.square().mean(-1).sqrt().max()

    return change


@pytest.mark.parametrize("comp", ["none", "lsq_capped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_forms_withstand_an_attack(pruned_pair, ascend, on_sphere, activation, comp):
    """Oracle: ascent on the logits over sequences in the ball, MLPs and heads pruned together."""
    dense, certificate, pruning = pruned_pair(activation, comp, keep_heads=0.5, **LAYOUT)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate, max_evals=5)
    start = on_sphere((8, 16, 8), certificate.radius)
    found = ascend(logit_change(dense, pruning.model), start, certificate.radius)
    for form in deviation.forms:
        assert 0 < found <= form.bound
    assert deviation.logits == min(form.bound for form in deviation.forms)


def test_proofs_with_multipliers_withstand_an_attack_and_are_tighter(
    pruned_pair, ascend, on_sphere
):
    """The same with tightened certificates of both networks, whose domains are ellipsoids."""
    dense, naive, pruning = pruned_pair("gelu", keep_heads=0.5, **LAYOUT)
    settings = TightenSettings(max_evals=20, stream_steps=5)
    proofs = [certify(model, settings=settings) for model in (dense, pruning.model)]
    deviation = certified_deviation(
        dense, pruning.model, pruning.kept, proofs[0], changed_certificate=proofs[1]
    )
    loose = certified_deviation(
        dense,
        pruning.model,
        pruning.kept,
        naive,
        changed_certificate=certify(pruning.model, tighten=False),
    )
    start = on_sphere((8, 16, 8), naive.radius)
    found = ascend(logit_change(dense, pruning.model), start, naive.radius)
    for form, weaker in zip(deviation.forms, loose.forms, strict=True):
        assert found <= form.bound < weaker.bound


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_streams_stay_within_the_reported_radii(pruned_pair, on_sphere, activation):
    """Oracle: token norms along both networks, from inputs on the sphere of the domain."""
    dense, certificate, pruning = pruned_pair(activation, "lsq", keep=0.3, keep_heads=0.5, **LAYOUT)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate)
    for model, form in zip((dense, pruning.model), deviation.forms, strict=True):
        x, seen = on_sphere((64, 16, 8), certificate.radius), []
        with torch.no_grad():
            for layer in model.layers:
                for block in (layer.attend_block, layer.mlp_block):
                    seen.append(float(x.norm(dim=-1).max()))
                    x = block(x)
        for norm, radius in zip(seen, form.radii, strict=True):
            assert norm <= radius * (1 + 1e-12)


def test_constants_are_proved_again_where_tokens_leave_the_old_ball(make_model):
    """A change that enlarges the tokens must not use constants of the smaller ball."""
    dense = make_model("relu", bias=False)
    certificate = certify(dense)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in changed.layers:
            layer.mlp.down.weight.mul_(3)
    form = certified_deviation(dense, changed, None, certificate).b
    old, new = certificate.blocks[2], form.certificate.blocks[2]
    assert form.radii[2] > old.radius_in
    assert new.radius_in >= form.radii[2]
    assert new.tightened > old.tightened
    # Oracle: the constant is (1 - a) + a (c0 + c1 R^2), so it grows at most quadratically.
    a = dense.config.layer(1).attn_residual
    growth = (new.radius_in / old.radius_in) ** 2
    assert new.tightened <= (1 - a) + (old.tightened - (1 - a)) * growth * (1 + 1e-9)


@pytest.mark.parametrize("activation", ["gelu", "maxmin"])
def test_reweighted_outputs_are_covered_without_any_removal(
    make_model, ascend, on_sphere, activation
):
    """Edits of down projections, their biases and output matrices, everything kept."""
    dense = make_model(activation, heads=4, content_heads=2)
    certificate = certify(dense, tighten=False)
    changed = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in changed.layers:
            for tensor in (
                layer.mlp.down.weight,
                layer.mlp.down.bias,
                layer.attention.output.weight,
            ):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor += 0.05 * noise
    deviation = certified_deviation(dense, changed, None, certificate)
    start = on_sphere((8, 16, 8), certificate.radius)
    found = ascend(logit_change(dense, changed), start, certificate.radius)
    assert all(0 < found <= form.bound for form in deviation.forms)
    assert all(delta > 0 for form in deviation.forms for delta in form.deltas)


def test_no_bound_exceeds_what_the_radii_allow(make_model, ascend, on_sphere):
    """Large edits that keep the tokens small: the radii alone say more than the recursion."""
    dense = make_model("tanh", heads=4, bias=False, attn_residual=0.9, mlp_residual=0.9)
    changed = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in changed.layers:
            layer.mlp.down.weight.mul_(-1)
            layer.attention.output.weight.mul_(-1)
    certificate, other = (certify(model, tighten=False) for model in (dense, changed))
    deviation = certified_deviation(dense, changed, None, certificate, changed_certificate=other)
    start = on_sphere((8, 16, 8), certificate.radius)
    found = ascend(logit_change(dense, changed), start, certificate.radius)
    for form in deviation.forms:
        free = dataclasses.replace(form, limits=(float("inf"),) * 4)
        assert found <= form.bound <= form.limit * (1 + 1e-12) < free.bound
        # Oracle: the networks have mirrored blocks, so one radius bounds both.
        radius = certificate.blocks[-1].radius_out
        scale = certificate.head_norm / certificate.vocab_size**0.5
        assert form.limit == pytest.approx(2 * scale * radius, rel=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_change_means_no_deviation(pruned_pair, tokens, activation):
    """Everything kept: all bounds are exactly 0 and the logits are bit-identical."""
    dense, certificate, pruning = pruned_pair(activation, keep=1.0)
    deviation = certified_deviation(dense, pruning.model, pruning.kept, certificate)
    for form in deviation.forms:
        assert form.bound == form.stream_bound == 0.0
        assert set(form.deltas) == {0.0}
    assert measure_deviation(dense, pruning.model, tokens()).logits == 0.0
    assert torch.equal(dense(tokens()), pruning.model(tokens()))


def test_recursion_is_that_of_the_certificate(pruned_pair):
    """Oracle: ``Certificate.logit_deviation``, which runs the recursion in plain floats."""
    dense, certificate, pruning = pruned_pair("relu", keep_heads=0.5)
    form = certified_deviation(dense, pruning.model, pruning.kept, certificate).b
    form = dataclasses.replace(form, limits=(float("inf"),) * 4)
    assert form.bound == pytest.approx(form.certificate.logit_deviation(form.deltas), rel=1e-10)
    ones = torch.eye(4, dtype=torch.float64)
    for gain, bound in zip(form.gains(), form.logits(ones).tolist(), strict=True):
        assert gain == pytest.approx(bound, rel=1e-9)


def test_pieces_that_are_not_whole_components_are_refused(pruned_pair):
    """Half a pair, half a group, another order: hidden activations would not match."""
    dense, certificate, pruning = pruned_pair("maxmin", keep_heads=0.5, heads=4, kv_heads=2)
    for name in ("layers.0.mlp", "layers.1.heads"):
        kept_K = pruning.kept[name]
        for wrong_K in (kept_K.flip(0), kept_K[1:], kept_K[:0]):
            kept = {**pruning.kept, name: wrong_K}
            with pytest.raises(CertificateError, match=f"{name}: kept inputs"):
                certified_deviation(dense, pruning.model, kept, certificate)
    with pytest.raises(CertificateError, match="configuration"):
        certified_deviation(dense, pruning.model, None, certificate)


@pytest.mark.parametrize(
    "name",
    [
        "head.weight",
        "embedding.weight",
        "layers.0.mlp.up.bias",
        "layers.1.mlp.up.weight",
        "layers.0.attention.query.weight",
        "layers.0.attention.key.weight",
        "layers.1.attention.value.weight",
        "layers.1.attention.position_bias",
    ],
)
def test_changes_the_bounds_do_not_see_are_refused(pruned_pair, name):
    """One number moved by a millionth outside the output matrices."""
    dense, certificate, pruning = pruned_pair("relu", keep_heads=0.5, **LAYOUT)
    with torch.no_grad():
        pruning.model.get_parameter(name).view(-1)[0] += 1e-6
    with pytest.raises(CertificateError, match=name.replace(".", r"\.")):
        certified_deviation(dense, pruning.model, pruning.kept, certificate)


def test_another_configuration_or_domain_is_refused(pruned_pair):
    """Constants of the frame enter no delta; two proofs must speak about the same inputs."""
    dense, certificate, pruning = pruned_pair("relu")
    small = dataclasses.replace(certificate, radius=certificate.radius / 2)
    with pytest.raises(CertificateError, match="certify both networks again"):
        certified_deviation(
            dense, pruning.model, pruning.kept, certificate, changed_certificate=small
        )
    pruning.model.config = pruning.model.config.replace(final_scale=2.0)
    with pytest.raises(CertificateError, match="configuration"):
        certified_deviation(dense, pruning.model, pruning.kept, certificate)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "layers.0.mlp.up.weight"])
@pytest.mark.parametrize("bias", [True, False])
def test_all_zero_matrices_are_bounded_like_any_other(pruned_pair, tokens, name, bias):
    """Measured <= certified where radii, head norm or activations vanish."""
    dense, _, _ = pruned_pair("maxmin", bias=bias)
    with torch.no_grad():
        dense.get_parameter(name).zero_()
    settings = CompressConfig(keep=0.6, tokens=1)
    pruning = prune_model(dense, tokens(), settings)
    proof = certify(dense, tighten=False)
    report = make_report(dense, proof, pruning, tokens(), settings)
    assert report.measured_deviation <= report.certified_deviation + report.text.allowance
    assert report.certified_deviation < 10
    assert 0 <= report.certified_top1 <= report.text_top1 <= report.top1_agreement
