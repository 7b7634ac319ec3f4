"""Forged model directories: whatever is edited, a weaker claim than the honest one is not accepted.

Every forgery is made consistent (hashes of tensors, configuration and files are made again), so
that only the proof itself stands in its way.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.bundle import load_bundle, save_bundle
from common.classifier_certificate import load_certificate
from common.models import LipschitzTransformer
from common.tokenizer import ByteTokenizer
from solvers.bounds import TightenSettings, certify, verify
from solvers.bounds.campaign import random_pairs

BRIEF = TightenSettings(max_evals=3)
TINY = {"vocab_size": 256, "width": 4, "layers": 1, "heads": 2, "mlp_width": 6, "context": 4}

BuildModel = Callable[..., LipschitzTransformer]
Forge = Callable[[str], Any]


def _leaves(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            if key not in ("settings", "versions"):
                yield from _leaves(value, (*place, key))
    else:
        yield place, content


def _with_leaf(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "lowered": lambda x: x * (1 - 1e-6) if x > 0 else x - 1e-6 * abs(x),
    "negated": lambda x: -x,
    "zero": lambda x: 0.0,
    "negative zero": lambda x: -0.0,
    "denormal": lambda x: 5e-324,
    "nan": lambda x: math.nan,
    "infinite": lambda x: -math.inf,
    "text": str,
    "true": lambda x: True,
    "null": lambda x: None,
    "list": lambda x: [x],
    "huge integer": lambda x: -(10**400),
    "integer": lambda x: math.floor(x),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("sort", ["gelu", "classifier"])
def test_no_number_can_be_weakened(forge: Forge, sort: str, mutation: str) -> None:
    """Oracle: every number of the file, one at a time; accepted claims stay as honest ones."""
    forgery = forge(sort)
    content = forgery.read()
    places = [p for p, value in _leaves(content) if type(value) in (int, float)]
    assert len(places) > 20
    for place in places:
        value = content
        for key in place:
            value = value[key]
        forgery.write(_with_leaf(content, place, MUTATIONS[mutation](value)))
        forgery.seal(proof=False)
        forgery.assert_no_weaker((place, mutation))


@pytest.mark.parametrize("sort", ["gelu", "classifier"])
def test_no_field_can_be_left_out_or_added(forge: Forge, sort: str) -> None:
    """Oracle: a missing or foreign field is refused or changes nothing that is claimed."""
    forgery = forge(sort)
    content = forgery.read()
    for name in content:
        forgery.write({key: value for key, value in content.items() if key != name})
        forgery.seal(proof=False)
        forgery.assert_no_weaker(name)
    forgery.write(content | {"surprise": 1.0})
    forgery.seal(proof=False)
    assert forgery.accepted() is None


@pytest.mark.parametrize("sort", ["gelu", "maxmin", "classifier"])
def test_sampled_bits_of_every_file(forge: Forge, sort: str) -> None:
    """Oracle: a flipped bit is refused; resealed, it leaves no weaker claim."""
    forgery, generator = forge(sort), torch.Generator().manual_seed(0)
    for file in sorted(forgery.path.iterdir()):
        data = file.read_bytes()
        for position in torch.randint(len(data), (12,), generator=generator).tolist():
            spoiled = bytearray(data)
            spoiled[position] ^= 1 << int(torch.randint(8, (), generator=generator))
            file.write_bytes(spoiled)
            if file.name != "manifest.json":
                assert forgery.accepted() is None, (file.name, position)
                forgery.seal(proof=False)
            forgery.assert_no_weaker((file.name, position))
            file.write_bytes(data)
            forgery.seal(proof=False)
    assert forgery.accepted() is not None


@pytest.mark.parametrize("sort", ["gelu", "classifier"])
def test_truncated_files_are_refused(forge: Forge, sort: str) -> None:
    """Oracle: the certificate and the weights are needed whole, even with matching hashes."""
    for name in ("certificate.json", "certificate.safetensors", "model.safetensors", "config.json"):
        data = (forge(sort).path / name).read_bytes()
        for length in (0, 1, 7, len(data) // 2, len(data) - 2):
            forgery = forge(sort)
            (forgery.path / name).write_bytes(data[:length])
            forgery.seal(proof=False)
            assert forgery.accepted() is None, (name, length)


def test_larger_weights_with_forged_hashes_are_refused(forge: Forge) -> None:
    """Oracle: doubling the largest entry of any matrix raises what can be proved."""
    matrices = [n for n, t in forge("gelu").tensors("model.safetensors").items() if t.ndim == 2]
    for name in matrices:
        forgery = forge("gelu")
        weights = forgery.tensors("model.safetensors")
        weights[name].view(-1)[weights[name].abs().argmax()] *= 2
        forgery.write_tensors("model.safetensors", weights)
        forgery.seal()
        assert forgery.accepted() is None, name


@pytest.mark.parametrize("sort", ["gelu", "maxmin"])
def test_flipped_bits_of_weights_with_forged_hashes(forge: Forge, sort: str) -> None:
    """Oracle: pairs of inputs of the changed model never exceed a bound that is accepted."""
    generator = torch.Generator().manual_seed(1)
    data = (forge(sort).path / "model.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for position in torch.randint(start, len(data), (24,), generator=generator).tolist():
        forgery, spoiled = forge(sort), bytearray(data)
        spoiled[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        (forgery.path / "model.safetensors").write_bytes(spoiled)
        forgery.seal()
        if (certificate := forgery.accepted()) is not None:
            model = load_bundle(forgery.path).model.double()
            assert random_pairs(model, certificate.radius, 50, 4, 0) <= certificate.tightened


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": ["gelu_tanh"]},
        {"activation": ["abs"]},
        {"gelu_divisor": [1.0]},
        {"softmax_scale": [1.01]},
        {"attn_factor": [0.34]},
        {"final_scale": 1.001},
        {"attn_residual": [0.6]},
        {"mlp_residual": [1.5]},
        {"heads": [1], "kv_heads": [1], "content_heads": [1], "head_dim": [4]},
        {"kv_heads": [1]},
        {"vocab_size": 128},
        {"width": 2},
        {"layers": 2},
    ],
    ids=str,
)
def test_another_model_with_forged_hashes_is_refused(forge: Forge, changes: dict[str, Any]) -> None:
    """Oracle: each change makes the map more sensitive, or the tensors no longer fit."""
    forgery = forge("gelu")
    config = forgery.read("config.json")
    config["transformer"] |= changes
    forgery.write(config, "config.json")
    forgery.seal()
    assert forgery.accepted() is None


def test_blocks_and_multipliers_in_other_places_are_refused(forge: Forge) -> None:
    """Oracle: each block is proved for its own weights and its own ball."""
    content = forge("deep").read()
    blocks = content["blocks"]
    places = [(b["index"], b["layer"], b["kind"]) for b in blocks]
    orders = {"layers": (2, 3, 0, 1), "kinds": (1, 0, 3, 2), "repeated": (0, 1, 0, 1)}
    for order in orders.values():
        forgery = forge("deep")
        moved = [dict(blocks[i]) for i in order]
        for block, (index, layer, kind) in zip(moved, places, strict=True):
            block |= {"index": index, "layer": layer, "kind": kind}
        forgery.write(content | {"blocks": moved})
        forgery.seal(proof=False)
        forgery.assert_no_weaker(order)
    for wrong in (blocks[:-1], blocks[:2], [*blocks, blocks[-1]], [], None, {}, "blocks"):
        forgery = forge("deep")
        forgery.write(content | {"blocks": wrong})
        forgery.seal(proof=False)
        assert forgery.accepted() is None
    forgery = forge("deep")
    tensors = forgery.tensors("certificate.safetensors")
    swapped = {name.translate(str.maketrans("0213", "2031")): t for name, t in tensors.items()}
    forgery.write_tensors("certificate.safetensors", swapped)
    forgery.seal()
    forgery.assert_no_weaker("swapped multipliers")


@pytest.mark.parametrize(
    "value", [0.0, -0.0, -1.0, math.nan, math.inf, 5e-324, 1e-310, 1e-100, 1e100, 1e308]
)
def test_extreme_multipliers_with_forged_hashes(forge: Forge, value: float) -> None:
    """Oracle: they prove a larger bound or nothing; never a smaller one, never a traceback."""
    names = list(forge("maxmin").tensors("certificate.safetensors"))
    for name in names:
        for where in (slice(0, 1), slice(None)):
            forgery = forge("maxmin")
            tensors = forgery.tensors("certificate.safetensors")
            tensors[name].view(-1)[where] = value
            forgery.write_tensors("certificate.safetensors", tensors)
            forgery.seal()
            forgery.assert_no_weaker((name, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_multipliers_of_other_types_are_refused(forge: Forge, dtype: torch.dtype) -> None:
    """Oracle: the contract says float64."""
    for name in forge("gelu").tensors("certificate.safetensors"):
        forgery = forge("gelu")
        tensors = forgery.tensors("certificate.safetensors")
        tensors[name] = tensors[name].to(dtype)
        forgery.write_tensors("certificate.safetensors", tensors)
        forgery.seal()
        assert forgery.accepted() is None, name


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_of_other_types_are_refused(forge: Forge, dtype: torch.dtype) -> None:
    """Oracle: no model computes with them."""
    forgery = forge("gelu")
    tensors = forgery.tensors("model.safetensors")
    tensors["head.weight"] = tensors["head.weight"].to(dtype)
    forgery.write_tensors("model.safetensors", tensors)
    forgery.seal()
    assert forgery.accepted() is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40])
def test_weights_that_admit_no_proof(forge: Forge, value: float) -> None:
    """Oracle: NaN and infinity are refused; a denormal changes no bound."""
    for name in forge("gelu").tensors("model.safetensors"):
        forgery = forge("gelu")
        tensors = forgery.tensors("model.safetensors")
        tensors[name].view(-1)[0] = value
        forgery.write_tensors("model.safetensors", tensors)
        forgery.seal()
        certificate = forgery.accepted()
        assert certificate is None or math.isfinite(value), name


def test_a_larger_domain_is_refused(forge: Forge) -> None:
    """Oracle: a token outside the certified ball, hidden among 256 rows."""
    forgery = forge("gelu")
    tensors = forgery.tensors("model.safetensors")
    tensors["embedding.weight"][77] = 1.001 * forgery.honest["radius"] / 2
    forgery.write_tensors("model.safetensors", tensors)
    forgery.seal()
    assert forgery.accepted() is None


@pytest.mark.parametrize("sort", ["gelu", "classifier"])
def test_a_key_that_is_given_twice_is_refused(forge: Forge, sort: str) -> None:
    """Oracle: other readers of JSON take the first of two values, ours the last."""
    forgery = forge(sort)
    text = (forgery.path / "certificate.json").read_text()
    for name in ("tightened", "weights_sha256"):
        (forgery.path / "certificate.json").write_text(text.replace("{", f'{{"{name}": 0.1, ', 1))
        forgery.seal(proof=False)
        assert forgery.accepted() is None, name
    config = (forgery.path / "config.json").read_text()
    (forgery.path / "certificate.json").write_text(text)
    (forgery.path / "config.json").write_text(config.replace("{", '{"kind": "x", ', 1))
    forgery.seal(proof=False)
    assert forgery.accepted() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_honest_certificates_of_every_type_are_accepted(
    tmp_path: Path, build_model: BuildModel, dtype: torch.dtype
) -> None:
    """Oracle: what the certifier proves of stored weights, the checker re-proves."""
    for seed in range(3):
        model = build_model(seed, norm=1.3, **TINY, position_bias=True).to(dtype)
        model = model.float() if dtype.itemsize == 2 else model
        proof = certify(model, settings=BRIEF)
        path = tmp_path / str(seed)
        save_bundle(path, model, ByteTokenizer(), certificate=proof, dtype=dtype)
        assert verify(path).tightened == proof.tightened


def test_honest_certificates_of_every_family_are_accepted(any_model: LipschitzTransformer) -> None:
    """Oracle: the certifier's own claim, with and without multipliers, and as read from a file."""
    for tighten in (True, False):
        proof = certify(any_model, tighten, settings=BRIEF)
        assert verify(any_model, proof).tightened == proof.tightened
        directory = Path("saved")
        directory.mkdir(exist_ok=True)
        proof.save(directory)
        assert verify(any_model, load_certificate(directory)).tightened == proof.tightened
