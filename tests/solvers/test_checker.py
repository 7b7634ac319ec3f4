"""The checker accepts what the certifier proved and names whatever was changed."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common.certificate import Certificate, tensors_sha256
from common.errors import CertificateError
from common.models import LipschitzTransformer
from solvers.bounds import certify, verify

EDIT = 1 - 1e-9  # the smallest downward edit that must be noticed
TINY_MODEL = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 10, "context": 8}

BuildModel = Callable[..., LipschitzTransformer]


@pytest.fixture(scope="module")
def certified(build_model: BuildModel) -> tuple[LipschitzTransformer, Certificate]:
    """Return a small model with its certificate, made once."""
    model = build_model(**TINY_MODEL | {"layers": 2}, activation="maxmin", mlp_bias=True)
    return model, certify(model)


@pytest.fixture
def proof(
    certified: tuple[LipschitzTransformer, Certificate],
) -> tuple[LipschitzTransformer, Certificate]:
    """Return copies that a test may spoil."""
    model, certificate = certified
    return copy.deepcopy(model), certificate


def _with_block(certificate: Certificate, index: int, **changes: Any) -> Certificate:
    blocks = list(certificate.blocks)
    blocks[index] = dataclasses.replace(blocks[index], **changes)
    return dataclasses.replace(certificate, blocks=tuple(blocks))


def _with_multiplier(certificate: Certificate, name: str, tensor: Tensor) -> Certificate:
    multipliers = {**certificate.multipliers, name: tensor}
    hashes = tensors_sha256(multipliers)
    return dataclasses.replace(certificate, multipliers=multipliers, multipliers_sha256=hashes)


def test_the_certified_model_passes(proof: tuple[LipschitzTransformer, Certificate]) -> None:
    """Oracle: the certifier's own claim."""
    model, certificate = proof
    report = verify(model, certificate)
    assert report.blocks == 4
    assert report.tightened == certificate.tightened
    assert 0 < report.margin < 1e-6


@pytest.mark.parametrize("name", ["naive", "tightened", "head_norm", "pair_norm", "radius"])
def test_an_edited_total_is_named(
    proof: tuple[LipschitzTransformer, Certificate], name: str
) -> None:
    """Oracle: a value lowered by 1e-9 relative is below what can be proved."""
    model, certificate = proof
    edited = dataclasses.replace(certificate, **{name: getattr(certificate, name) * EDIT})
    with pytest.raises(CertificateError, match=f"^{name}="):
        verify(model, edited)


@pytest.mark.parametrize("name", ["log10_naive", "log10_tightened"])
def test_an_edited_logarithm_is_named(
    proof: tuple[LipschitzTransformer, Certificate], name: str
) -> None:
    """Oracle: the sum of the logarithms."""
    model, certificate = proof
    value = getattr(certificate, name)
    edited = dataclasses.replace(certificate, **{name: value - 1e-9 * abs(value)})
    with pytest.raises(CertificateError, match=f"^{name}="):
        verify(model, edited)


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["naive", "tightened", "radius_out", "naive_radius_out"])
def test_an_edited_block_is_named(
    proof: tuple[LipschitzTransformer, Certificate], index: int, name: str
) -> None:
    """Oracle: a block value lowered by 1e-9 relative is below what can be proved."""
    model, certificate = proof
    value = getattr(certificate.blocks[index], name) * EDIT
    with pytest.raises(CertificateError, match=f"^block {index} {name}="):
        verify(model, _with_block(certificate, index, **{name: value}))


@pytest.mark.parametrize("name", ["radius_in", "naive_radius_in"])
@pytest.mark.parametrize("factor", [EDIT, 1 / EDIT])
def test_a_broken_radius_chain_is_named(
    proof: tuple[LipschitzTransformer, Certificate], name: str, factor: float
) -> None:
    """Oracle: each block starts from the radius that the one before it proved."""
    model, certificate = proof
    value = getattr(certificate.blocks[2], name) * factor
    with pytest.raises(CertificateError, match=f"block 2 {name}="):
        verify(model, _with_block(certificate, 2, **{name: value}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1.0", None, True])
def test_values_that_are_no_numbers_are_refused(
    proof: tuple[LipschitzTransformer, Certificate], bad: Any
) -> None:
    """Oracle: NaN compares as false with everything and must not slip through."""
    model, certificate = proof
    with pytest.raises(CertificateError, match="finite number"):
        verify(model, _with_block(certificate, 1, tightened=bad))
    with pytest.raises(CertificateError, match="head_norm"):
        verify(model, dataclasses.replace(certificate, head_norm=bad))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0, 1e200])
def test_bad_multipliers_are_refused_even_with_a_right_hash(
    proof: tuple[LipschitzTransformer, Certificate], value: float
) -> None:
    """Oracle: only positive finite multipliers prove anything."""
    model, certificate = proof
    for name in ("blocks.0.query", "blocks.1.lambda"):
        tensor = certificate.multipliers[name].clone()
        tensor[0] = value
        with pytest.raises(CertificateError, match=f"multiplier {name}: expected positive"):
            verify(model, _with_multiplier(certificate, name, tensor))


def test_multipliers_of_another_shape_or_type_are_refused(
    proof: tuple[LipschitzTransformer, Certificate],
) -> None:
    """Oracle: the contract of the multiplier tensors."""
    model, certificate = proof
    tensor = certificate.multipliers["blocks.1.lambda"]
    for bad in (tensor.float(), tensor[:-1].clone(), tensor[:, None].clone()):
        with pytest.raises(CertificateError, match=r"multiplier blocks\.1\.lambda: torch"):
            verify(model, _with_multiplier(certificate, "blocks.1.lambda", bad))
    with pytest.raises(CertificateError, match=r"blocks\.9\.lambda: belongs to no block"):
        verify(model, _with_multiplier(certificate, "blocks.9.lambda", tensor))
    with pytest.raises(CertificateError, match=r"blocks\.1\.extra: not expected"):
        verify(model, _with_multiplier(certificate, "blocks.1.extra", tensor))


def test_a_changed_multiplier_is_named(proof: tuple[LipschitzTransformer, Certificate]) -> None:
    """Oracle: the tensor's hash, and with a forged hash the proved value."""
    model, certificate = proof
    name = "blocks.3.lambda"
    tensor = certificate.multipliers[name].clone()
    tensor.view(torch.int64)[1] ^= 1
    edited = dataclasses.replace(certificate, multipliers={**certificate.multipliers, name: tensor})
    with pytest.raises(CertificateError, match=f"multiplier tensor {name}"):
        verify(model, edited)
    with pytest.raises(CertificateError, match="block 3 tightened"):
        verify(model, _with_multiplier(certificate, name, torch.full_like(tensor, 1.0)))
    dropped = {k: v for k, v in certificate.multipliers.items() if k != name}
    with pytest.raises(CertificateError, match=f"multiplier tensor {name}: missing"):
        verify(model, dataclasses.replace(certificate, multipliers=dropped))


def test_a_changed_weight_is_named(proof: tuple[LipschitzTransformer, Certificate]) -> None:
    """Oracle: the tensor's hash; even an unused position of the embedding counts."""
    model, certificate = proof
    for name in ("layers.1.attention.key.weight", "embedding.weight", "layers.0.mlp.up.bias"):
        parameter = model.get_parameter(name)
        kept = parameter.clone()
        parameter.view(torch.int64).view(-1)[0] ^= 1
        with pytest.raises(CertificateError, match=f"weight tensor {name}: content differs"):
            verify(model, certificate)
        parameter.copy_(kept)
    with pytest.raises(CertificateError, match="weight tensor"):
        verify(model.float(), certificate)


def test_another_configuration_is_refused(
    proof: tuple[LipschitzTransformer, Certificate],
) -> None:
    """Oracle: the configuration hash; the residual weight is not in any tensor."""
    model, certificate = proof
    model.config = model.config.with_layer(1, mlp_residual=0.01)
    with pytest.raises(CertificateError, match="configuration"):
        verify(model, certificate)


def test_blocks_missing_repeated_or_out_of_order_are_refused(
    proof: tuple[LipschitzTransformer, Certificate],
) -> None:
    """Oracle: two blocks per layer, in execution order."""
    model, certificate = proof
    blocks = certificate.blocks
    with pytest.raises(CertificateError, match="blocks"):
        verify(model, dataclasses.replace(certificate, blocks=blocks[:2]))
    for wrong in (blocks[2:] + blocks[:2], (blocks[0], blocks[0], *blocks[2:])):
        with pytest.raises(CertificateError, match="block"):
            verify(model, dataclasses.replace(certificate, blocks=wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 9}, "width"),
        ({"vocab_size": 1000}, "vocab_size"),
        ({"format_version": 1}, "format_version"),
        ({"reference_sound": True}, "reference_sound"),
        ({"attack": 1e9}, "against attack"),
    ],
)
def test_other_lies_are_named(
    proof: tuple[LipschitzTransformer, Certificate], changes: dict[str, Any], message: str
) -> None:
    """Oracle: the field that was changed."""
    model, certificate = proof
    with pytest.raises(CertificateError, match=message):
        verify(model, dataclasses.replace(certificate, **changes))


def test_an_attack_above_its_block_is_named(
    proof: tuple[LipschitzTransformer, Certificate],
) -> None:
    """Oracle: attack <= tightened must hold in every block."""
    model, certificate = proof
    components = {**certificate.blocks[0].components, "attack": 1e6}
    with pytest.raises(CertificateError, match="against attack"):
        verify(model, _with_block(certificate, 0, components=components))


def test_weights_that_are_not_finite_are_refused(build_model: BuildModel) -> None:
    """Oracle: no bound exists."""
    model = build_model(**TINY_MODEL)
    model.layers[0].mlp.up.weight[0, 0] = math.nan
    with pytest.raises(CertificateError, match="NaN"):
        certify(model)


def test_a_model_needs_its_certificate(build_model: BuildModel) -> None:
    """Oracle: the contract."""
    with pytest.raises(CertificateError, match="beside the model"):
        verify(build_model(**TINY_MODEL))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_biases_that_spoil_the_softmax_are_refused(build_model: BuildModel, value: float) -> None:
    """Oracle: with such a bias the model's output is NaN, which no constant bounds."""
    model = build_model(**TINY_MODEL, position_bias=True)
    certificate = certify(model)
    model.layers[0].attention.position_bias.data.fill_(value)
    with pytest.raises(CertificateError, match="NaN or infinity"):
        certify(model)
    hashes = tensors_sha256(model.state_dict())
    with pytest.raises(CertificateError, match="NaN or infinity"):
        verify(model, dataclasses.replace(certificate, weights_sha256=hashes))


def test_scales_at_which_a_product_underflows_are_refused(build_model: BuildModel) -> None:
    """Oracle: the same map at other scales; its value Gram underflows, so tau was proved 0."""
    model = build_model(**TINY_MODEL)
    certificate, attention = certify(model), model.layers[0].attention
    attention.value.weight.data = attention.value.weight.data.double() * 1e-170
    attention.output.weight.data = attention.output.weight.data.double() * 1e170
    hashes = tensors_sha256(model.state_dict())
    with pytest.raises(CertificateError, match=r"attention\.value\.weight: expected"):
        verify(model, dataclasses.replace(certificate, weights_sha256=hashes))


def test_a_naive_ball_inside_the_tightened_one_is_refused(
    proof: tuple[LipschitzTransformer, Certificate],
) -> None:
    """Oracle: ``tightened`` may be the naive bound, which holds on the naive ball alone."""
    model, certificate = proof
    grown = certificate.blocks[0].naive_radius_out * 2
    with pytest.raises(CertificateError, match="block 0 naive_radius_out"):
        verify(model, _with_block(certificate, 0, radius_out=grown))


def test_a_reference_called_sound_must_reach_the_proof(build_model: BuildModel) -> None:
    """Oracle: a number below the proved bound is not shown to be one."""
    model = build_model(**TINY_MODEL | {"heads": 1})
    certificate = certify(model)
    below = certificate.tightened / 2
    with pytest.raises(CertificateError, match=r"^reference="):
        verify(model, dataclasses.replace(certificate, reference=below, reference_sound=True))


@pytest.mark.parametrize("bad", ["x", 10**400])
def test_foreign_json_numbers_are_refused_in_one_line(
    proof: tuple[LipschitzTransformer, Certificate], bad: Any
) -> None:
    """Oracle: the contract: bad input is a CertificateError, never a TypeError."""
    model, certificate = proof
    for name in ("attack", "tightened"):
        with pytest.raises(CertificateError, match=f"{name}"):
            verify(model, dataclasses.replace(certificate, **{name: bad}))
