"""Whole certificates: sound against attacks for every freedom, exact in the simple cases."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch

from common.errors import CertificateError
from common.models import LipschitzTransformer
from solvers.bounds import TightenSettings, attack, block_attack, certify, naive_bound, verify
from solvers.bounds.attack import AttackSettings
from solvers.bounds.checker import chain
from solvers.bounds.models import with_attack

REL = 1e-8  # proved values carry margins of about 1e-9
ATTACK = AttackSettings(steps=40, network_steps=20, restarts=6, tokens=8)
STRONG = AttackSettings(steps=60, restarts=4, tokens=24)
QUICK = TightenSettings(max_evals=10)

BuildModel = Callable[..., LipschitzTransformer]


def test_no_attack_exceeds_a_bound(any_model: LipschitzTransformer) -> None:
    """Oracle: optimised pairs of inputs on the ball of every block and through the network."""
    certificate = certify(any_model)
    verify(any_model, certificate)
    result = attack(any_model, certificate, settings=ATTACK)
    for block, value in zip(certificate.blocks, result.blocks, strict=True):
        assert 0 < value <= block.tightened <= block.naive
        assert block.dual is not None
        assert block.dual <= block.tightened
        assert block.radius_in <= block.naive_radius_in
    assert 0 < result.value <= certificate.tightened <= certificate.naive
    verify(any_model, with_attack(certificate, result))


def test_tracked_radii_hold_on_extreme_sequences(any_model: LipschitzTransformer) -> None:
    """Oracle: gradient ascent on the token norm after every block, from the whole input ball."""
    certificate = certify(any_model, settings=QUICK)
    x = torch.randn(4, 6, any_model.config.width, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.05)
    for _ in range(40):
        stream = certificate.radius * x / x.norm(dim=-1, keepdim=True)
        for index, layer in enumerate(any_model.layers):
            for half, run in enumerate((layer.attend_block, layer.mlp_block)):
                stream = run(stream)
                bound = certificate.blocks[2 * index + half].radius_out
                assert float(stream.detach().norm(dim=-1).max()) <= bound
        adam.zero_grad()
        (-stream.norm(dim=-1).sum()).backward()
        adam.step()


def test_the_four_head_counterexample(counterexample: LipschitzTransformer) -> None:
    """Oracle: bound_tightening 4.2: attack 2.449 against a rule of 1.0 and a bound of 3.333."""
    certificate = certify(counterexample)
    block = certificate.blocks[0]
    value = 3 * block_attack(counterexample, 0, certificate.radius, settings=STRONG)
    reference, naive, tightened = (
        3 * rho for rho in (block.reference, block.naive, block.tightened)
    )
    assert reference == pytest.approx(3.0, rel=1e-5)
    assert naive == pytest.approx(10.0, rel=1e-5)
    assert value > 2.2 * reference
    assert value < tightened < naive
    assert not certificate.reference_sound
    assert any(part > 0 for part in (block.components["tau"], block.components["lipschitz"]))


def test_reference_is_the_published_formula(build_model: BuildModel) -> None:
    """Oracle: 0.8758 for three layers at norm 1, 1.950 at norm 1.2 (lipschitz_training 5.1)."""
    for norm, expected in ((1.0, 0.8758), (1.2, 1.950), (2.0, 840.0)):
        model = build_model(kind="orthogonal", norm=norm, layers=3, vocab_size=16)
        found = certify(model, tighten=False)
        assert found.reference == pytest.approx(expected, rel=1e-3)
        assert found.log10_reference == pytest.approx(math.log10(expected), abs=1e-3)


def test_naive_bound_of_flat_weights_is_its_closed_form(build_model: BuildModel) -> None:
    """Oracle: (sqrt H + 2 H r^2) / 3 for the first attention block, slope top for the MLP."""
    model = build_model(kind="orthogonal", layers=1, vocab_size=16, width=64, heads=4)
    blocks = certify(model, tighten=False).blocks
    assert blocks[0].naive == pytest.approx(0.5 + 0.5 * (2 + 8) / 3, rel=1e-6)
    assert blocks[1].naive == pytest.approx(0.5 + 0.5 * 1.000003671879843, rel=REL)
    assert naive_bound(model) == pytest.approx(blocks[0].naive * blocks[1].naive, rel=REL)


def test_naive_certificate_needs_no_multipliers(build_model: BuildModel) -> None:
    """Oracle: tightened equals naive on the same radii, and the checker accepts it."""
    model = build_model()
    certificate = certify(model, tighten=False)
    assert not certificate.multipliers
    assert certificate.tightened == certificate.naive == naive_bound(model)
    verify(model, certificate)


def test_one_block_models_compose(build_model: BuildModel) -> None:
    """Oracle: product of block constants, head norm and sqrt(C / V), in logs and plainly."""
    certificate = certify(build_model(vocab_size=7))
    product = math.prod(block.tightened for block in certificate.blocks)
    expected = product * certificate.head_norm * math.sqrt(16 / 7)
    assert certificate.tightened <= expected * (1 + REL)
    logarithm = math.log10(certificate.tightened)
    assert certificate.log10_tightened == pytest.approx(logarithm, rel=REL, abs=REL)
    plain = certify(build_model(vocab_size=7), tighten=False)
    product = math.prod(block.naive for block in plain.blocks)
    assert plain.naive == pytest.approx(product * plain.head_norm * math.sqrt(16 / 7), rel=REL)
    assert math.prod(chain(certificate, "naive")) <= certificate.naive


def test_norms_scale_the_certificate_up(build_model: BuildModel) -> None:
    """Oracle: monotonicity of every bound in the norms of all matrices."""
    bounds = []
    for norm in (0.5, 1.0, 1.5, 2.0):
        certificate = certify(build_model(norm=norm), settings=QUICK)
        bounds.append((certificate.reference, certificate.naive, certificate.tightened))
    for smaller, larger in itertools.pairwise(bounds):
        assert all(a < b for a, b in zip(smaller, larger, strict=True))


def test_zero_matrices_leave_the_skip(build_model: BuildModel) -> None:
    """Oracle: a zero-initialised output makes a block the map (1 - a) x; a zero head ends it."""
    model = build_model(attn_residual=0.25, mlp_residual=0.5)
    for layer in model.layers:
        layer.attention.output.weight.zero_()
        layer.mlp.down.weight.zero_()
    model.head.weight.zero_()
    certificate = certify(model)
    verify(model, certificate)
    for block in certificate.blocks:
        expected = 0.5 if block.kind == "mlp" else 0.75
        assert block.tightened == pytest.approx(expected, rel=REL)
    assert certificate.tightened == certificate.naive == 0.0


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_dead_heads_are_no_obstacle(build_model: BuildModel, name: str) -> None:
    """Oracle: a head with a zero matrix certifies, and never above the naive bound."""
    model = build_model(norm=1.5)
    getattr(model.layers[0].attention, name).weight[:4] = 0
    certificate = certify(model, settings=QUICK)
    verify(model, certificate)
    assert certificate.blocks[0].tightened <= certificate.blocks[0].naive


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_types_are_certified_as_they_are(
    build_model: BuildModel, dtype: torch.dtype
) -> None:
    """Oracle: converting the same numbers to float64 gives the same bound, other hashes."""
    model = build_model().to(dtype)
    certificate = certify(model, settings=QUICK)
    verify(model, certificate)
    wide = certify(model.double(), settings=QUICK)
    assert wide.tightened == certificate.tightened
    assert wide.weights_sha256 != certificate.weights_sha256


def test_certifying_is_deterministic(build_model: BuildModel) -> None:
    """Oracle: two runs, equal to the last bit but for the wall time."""
    model = build_model()
    first, second = (certify(model, settings=QUICK) for _ in range(2))
    assert first.multipliers_sha256 == second.multipliers_sha256
    assert first.tightened == second.tightened


def test_huge_norms_stay_in_the_logarithm(build_model: BuildModel) -> None:
    """Oracle: additivity of logarithms where the product overflows."""
    model = build_model(norm=1e4, layers=6)
    certificate = certify(model, tighten=False)
    verify(model, certificate)
    assert certificate.naive == math.inf
    assert 308 < certificate.log10_naive < math.inf
    with pytest.raises(CertificateError, match="overflow"):
        certify(build_model(norm=1e40, layers=6), tighten=False)


def test_reference_is_called_sound_only_where_it_is(build_model: BuildModel) -> None:
    """Oracle: one head, and the published number at or above what is proved."""
    for heads in (1, 4):
        for activation in ("gelu", "relu"):
            certificate = certify(build_model(heads=heads, activation=activation), settings=QUICK)
            is_proved = certificate.reference >= certificate.tightened
            assert certificate.reference_sound == (heads == 1 and is_proved)


def test_a_larger_domain_can_be_certified_by_larger_embeddings(build_model: BuildModel) -> None:
    """Oracle: attention bounds grow with the square of the radius."""
    model = build_model()
    small = certify(model, tighten=False)
    model.embedding.weight.mul_(2)
    large = certify(model, tighten=False)
    assert large.radius == pytest.approx(2 * small.radius, rel=REL)
    assert large.blocks[0].naive > small.blocks[0].naive
    assert large.blocks[1].naive == pytest.approx(small.blocks[1].naive, rel=REL)


def test_settings_are_recorded(build_model: BuildModel) -> None:
    """Oracle: equality with what was asked for."""
    certificate = certify(build_model(), settings=QUICK)
    assert certificate.settings == {"tighten": True, **dataclasses.asdict(QUICK)}
