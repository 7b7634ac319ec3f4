"""The proof object: arithmetic of chains, hashes, files."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from common.certificate import (
    BlockProof,
    Certificate,
    config_sha256,
    log10_up,
    product_up,
    tensor_sha256,
    tensors_sha256,
)
from common.errors import CertificateError, ConfigError
from common.models import ModelConfig

REL = 1e-10  # roundings upward are of order 1e-12


def _block(index: int, tightened: float) -> BlockProof:
    return BlockProof(
        index=index,
        layer=index // 2,
        kind="mlp" if index % 2 else "attention",
        reference=1.0,
        naive=2 * tightened,
        tightened=tightened,
        radius_in=4.0,
        radius_out=4.0,
        naive_radius_in=4.0,
        naive_radius_out=4.0,
        components={"tau": 1.5},
    )


def _certificate(**changes: object) -> Certificate:
    multipliers = {"blocks.1.lambda": torch.rand(6, dtype=torch.float64) + 0.1}
    certificate = Certificate(
        width=16,
        vocab_size=64,
        radius=4.0,
        blocks=tuple(_block(i, rho) for i, rho in enumerate((3.0, 0.5, 2.0, 1.25))),
        head_norm=1.5,
        pair_norm=2.0,
        stream=3.75,
        reference=1.0,
        naive=60.0,
        tightened=2.8125,
        log10_reference=0.0,
        log10_naive=math.log10(60.0),
        log10_tightened=math.log10(2.8125),
        weights_sha256={"a": "0"},
        config_sha256="1",
        multipliers_sha256=tensors_sha256(multipliers),
        multipliers=multipliers,
    )
    return dataclasses.replace(certificate, **changes)


def test_amplification_is_the_product_of_later_blocks() -> None:
    """Oracle: hand product, never below it."""
    certificate = _certificate()
    for index, expected in ((-1, 3.75), (0, 1.25), (1, 2.5), (2, 1.25), (3, 1.0)):
        value = certificate.amplification(index)
        assert expected <= value <= expected * (1 + REL)
    assert certificate.amplification(1, "naive") == pytest.approx(10.0, rel=REL)
    with pytest.raises(ConfigError):
        certificate.amplification(0, "attack")


def test_logit_deviation_is_the_error_recursion() -> None:
    """Oracle: sum of deltas times later products, times head norm over sqrt V."""
    deltas = [0.1, 0.0, 0.2, 0.4]
    expected = (0.1 * 1.25 + 0.2 * 1.25 + 0.4) * 1.5 / 8
    value = _certificate().logit_deviation(deltas)
    assert expected <= value <= expected * (1 + REL)
    assert _certificate().logit_deviation([0.0] * 4) == 0.0


@pytest.mark.parametrize("deltas", [[0.1] * 3, [0.1, -1e-9, 0, 0], [math.nan] * 4, [math.inf] * 4])
def test_logit_deviation_refuses_what_is_no_bound(deltas: list[float]) -> None:
    """Oracle: the contract."""
    with pytest.raises(CertificateError):
        _certificate().logit_deviation(deltas)


def test_save_and_load_keep_every_field(tmp_path: Path) -> None:
    """Oracle: equality; JSON text holds no NaN or Infinity."""
    certificate = _certificate(attack=0.25, settings={"tol": 0.01})
    certificate.save(tmp_path)
    loaded = Certificate.load(tmp_path)
    assert loaded.to_dict() == certificate.to_dict()
    assert torch.equal(
        loaded.multipliers["blocks.1.lambda"], certificate.multipliers["blocks.1.lambda"]
    )
    assert {p.name for p in tmp_path.iterdir()} == {"certificate.json", "certificate.safetensors"}


def test_overflowed_totals_survive_as_null(tmp_path: Path) -> None:
    """Oracle: the logarithm stays finite, the number comes back infinite."""
    certificate = _certificate(naive=math.inf, log10_naive=400.0)
    certificate.save(tmp_path)
    assert json.loads((tmp_path / "certificate.json").read_text())["naive"] is None
    assert Certificate.load(tmp_path).naive == math.inf


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("certificate.json", None, "no such file"),
        ("certificate.safetensors", None, "no such file"),
        ("certificate.json", b"{", "damaged"),
        ("certificate.json", b"[]", "not a certificate"),
        ("certificate.json", b'{"format_version": 2}', "not a certificate"),
        ("certificate.json", b'{"format_version": 99}', "format version 99"),
        ("certificate.safetensors", b"\x00" * 5, "damaged"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Oracle: the error names the file and one line says what is wrong."""
    _certificate().save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CertificateError, match=message) as caught:
        Certificate.load(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensor_hash_covers_bits_type_and_shape() -> None:
    """Oracle: every single change gives another hash; copies, views, exact casts do not."""
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    base = tensor_sha256(tensor)
    assert tensor_sha256(tensor.T.contiguous().T) == base
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 1] ^= 1
    changed = [flipped, tensor.reshape(4, 3), tensor.double(), tensor.view(torch.int32)]
    assert len({base, *map(tensor_sha256, changed)}) == 5
    assert tensor_sha256(torch.zeros(0)) != tensor_sha256(torch.zeros(0, 1))
    rounded = tensor + 1e-4
    assert tensor_sha256(rounded.bfloat16()) != tensor_sha256(rounded.half())
    assert tensor_sha256(rounded.bfloat16()) == tensor_sha256(rounded.bfloat16().float())
    assert tensor_sha256(rounded.bfloat16()) != tensor_sha256(rounded)


def test_config_hash_depends_on_every_field() -> None:
    """Oracle: a changed field changes the hash, an equal configuration does not."""
    config = ModelConfig(vocab_size=5, width=8, layers=1, heads=2, context=4)
    assert config_sha256(config) == config_sha256(ModelConfig.from_dict(config.to_dict()))
    assert config_sha256(config) != config_sha256(config.replace(final_scale=1.5))


def test_chain_arithmetic_rounds_up() -> None:
    """Oracle: exact rational products and logarithms."""
    factors = [1.1, 0.3, 7.7]
    assert product_up(factors) > 1.1 * 0.3 * 7.7
    assert log10_up(factors) > math.log10(1.1 * 0.3 * 7.7)
    assert product_up([1e-200, 1e-200]) > 0
    assert product_up([0.0, 1e300, 1e300]) == 0.0
    assert log10_up([1e300, 1e300]) == pytest.approx(600.0, rel=REL)


def test_products_survive_an_underflow_on_the_way() -> None:
    """Oracle: exact exponents; a partial product of 1e-400 must not shrink the whole one."""
    assert 1.0 <= product_up([1e-200, 1e-200, 1e200, 1e200]) <= 1 + REL
    assert 1.0 <= product_up([1e200, 1e200, 1e-200, 1e-200]) <= 1 + REL
    assert product_up([1e300, 1e300]) == math.inf
    blocks = [dataclasses.replace(b, tightened=1e-300) for b in _certificate().blocks]
    certificate = _certificate(blocks=tuple(blocks))
    assert certificate.logit_deviation([1e-300, 0.0, 0.0, 0.0]) > 0
