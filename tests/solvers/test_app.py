"""Commands certify, verify and attack on bundles, honest and tampered with."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.bundle import extend_bundle, load_bundle, save_bundle
from common.certificate import Certificate
from common.models import LipschitzTransformer
from common.tokenizer import ByteTokenizer

CHEAP = ("certify.max_evals=5", "certify.attack_steps=2", "certify.attack_network_steps=2")
KINDS = ("structured", "gradient", "random", "power", "swaps")
BRIEF = ("attack.steps=2", "attack.network_steps=2", "attack.restarts=2", "attack.tokens=8")

BuildModel = Callable[..., LipschitzTransformer]
Command = Callable[..., Any]
Flip = Callable[[Path, str], None]


@pytest.fixture
def bundle(tmp_path: Path, build_model: BuildModel) -> Path:
    """Return a bundle without a certificate."""
    model = build_model(
        vocab_size=256, width=8, heads=2, mlp_width=12, activation="maxmin", mlp_bias=True
    )
    save_bundle(tmp_path / "model", model.float(), ByteTokenizer())
    return tmp_path / "model"


@pytest.fixture
def certified(bundle: Path, lipllm: Command) -> Path:
    """Return a bundle that ``lipllm certify`` has extended."""
    assert lipllm("certify", f"bundle={bundle}", *CHEAP).status == 0
    return bundle


def test_certify_stores_a_proof_and_reports_it(bundle: Path, lipllm: Command) -> None:
    """Oracle: the certificate in the bundle; attack <= tightened <= naive."""
    done = lipllm("certify", f"bundle={bundle}", *CHEAP)
    assert done.status == 0, done.err
    metrics = done.metrics
    certificate = load_bundle(bundle).certificate
    assert certificate is not None
    for name in ("reference", "naive", "tightened", "attack"):
        assert metrics[f"cert/{name}"] == getattr(certificate, name)
    assert 0 < metrics["cert/attack"] <= metrics["cert/tightened"] <= metrics["cert/naive"]
    assert certificate.settings["max_evals"] == 5
    assert metrics["cert/block/1"] == certificate.blocks[1].tightened


def test_certify_without_tightening(bundle: Path, lipllm: Command) -> None:
    """Oracle: no multipliers, equal bounds, no attack figure."""
    done = lipllm("certify", f"bundle={bundle}", "certify.tighten=false", "certify.attack_steps=0")
    metrics = done.metrics
    assert metrics["cert/tightened"] == metrics["cert/naive"]
    assert "cert/attack" not in metrics
    assert lipllm("verify", f"bundle={bundle}").status == 0


def test_verify_accepts_and_reports(certified: Path, lipllm: Command) -> None:
    """Oracle: the stored bound."""
    done = lipllm("verify", f"bundle={certified}")
    assert done.status == 0, done.err
    metrics = done.metrics
    assert metrics["verify/tightened"] == Certificate.load(certified).tightened
    assert metrics["verify/blocks"] == 4


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", "layers.0.attention.output.weight"),
        ("model.safetensors", "head.weight"),
        ("certificate.safetensors", "blocks.1.lambda"),
        ("certificate.safetensors", "blocks.2.value"),
    ],
)
def test_one_flipped_bit_is_named(
    certified: Path, lipllm: Command, flip_bit: Flip, file: str, tensor: str
) -> None:
    """Oracle: exit status 2 and one line that names the tensor."""
    flip_bit(certified / file, tensor)
    done = lipllm("verify", f"bundle={certified}")
    assert done.status == 2
    assert f"tensor {tensor}" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize("field", ["tightened", "naive", "log10_tightened", "head_norm"])
def test_a_bound_edited_downwards_is_named(certified: Path, lipllm: Command, field: str) -> None:
    """Oracle: exit status 2 and the name of the edited field."""
    path = certified / "certificate.json"
    content = json.loads(path.read_text())
    content[field] -= 1e-6 * abs(content[field])
    path.write_text(json.dumps(content))
    done = lipllm("verify", f"bundle={certified}")
    assert done.status == 2
    assert f"{field}=" in done.err


def test_a_block_edited_downwards_is_named(certified: Path, lipllm: Command) -> None:
    """Oracle: exit status 2 and the block."""
    path = certified / "certificate.json"
    content = json.loads(path.read_text())
    content["blocks"][3]["tightened"] *= 1 - 1e-6
    path.write_text(json.dumps(content))
    done = lipllm("verify", f"bundle={certified}")
    assert done.status == 2
    assert "block 3 tightened=" in done.err


@pytest.mark.parametrize("name", ["tokenizer.json", "certificate.json", "manifest.json"])
def test_other_damage_names_the_file(certified: Path, lipllm: Command, name: str) -> None:
    """Oracle: a harmless-looking extra byte still breaks the manifest."""
    with (certified / name).open("ab") as stream:
        stream.write(b" " if name != "manifest.json" else b"x")
    done = lipllm("verify", f"bundle={certified}")
    assert done.status == 2
    assert name in done.err


def test_verify_without_certificate_says_how_to_get_one(bundle: Path, lipllm: Command) -> None:
    """Oracle: the remedy in the message."""
    done = lipllm("verify", f"bundle={bundle}")
    assert done.status == 2
    assert "lipllm certify" in done.err


def test_attack_reports_estimates(certified: Path, lipllm: Command) -> None:
    """Oracle: the best is the largest of its kinds and below the bound."""
    done = lipllm("attack", f"bundle={certified}", *BRIEF)
    metrics = done.metrics
    kinds = [metrics[f"attack/{kind}"] for kind in KINDS]
    assert metrics["attack/best"] == max(kinds) <= Certificate.load(certified).tightened


@pytest.mark.parametrize(
    "override",
    [
        "certify.tol=-1",
        "certify.method=magic",
        "certify.tol=high",
        "certify.tool=1",
        "certify.attack_steps=-1",
        "certify.attack_tokens=0",
    ],
)
def test_bad_settings_are_refused(bundle: Path, lipllm: Command, override: str) -> None:
    """Oracle: exit status 2, one line naming the setting, bundle unchanged."""
    before = (bundle / "manifest.json").read_bytes()
    done = lipllm("certify", f"bundle={bundle}", override)
    assert done.status == 2
    assert override.partition("=")[0].removeprefix("certify.") in done.err
    assert (bundle / "manifest.json").read_bytes() == before


def test_certifying_again_keeps_the_larger_attack(certified: Path, lipllm: Command) -> None:
    """Oracle: the stored figure of a longer search, set by hand below the bound."""
    first = load_bundle(certified).certificate
    assert first is not None
    better = dataclasses.replace(first, attack=0.9 * first.tightened)
    extend_bundle(certified, certificate=better)
    done = lipllm("certify", f"bundle={certified}", *CHEAP)
    assert done.metrics["cert/attack"] == better.attack
    again = load_bundle(certified).certificate
    assert again is not None
    assert again.attack == better.attack


@pytest.mark.parametrize("found", ["high", 1e6])
def test_an_impossible_attack_does_not_outlive_its_file(
    certified: Path, lipllm: Command, found: Any
) -> None:
    """Oracle: a figure above its own bound, or none at all, was found by nobody."""
    first = load_bundle(certified).certificate
    assert first is not None
    extend_bundle(certified, certificate=dataclasses.replace(first, attack=found))
    assert lipllm("verify", f"bundle={certified}").status == 2
    done = lipllm("certify", f"bundle={certified}", *CHEAP)
    assert done.status == 0, done.err
    assert 0 < done.metrics["cert/attack"] <= done.metrics["cert/tightened"]
    assert lipllm("verify", f"bundle={certified}").status == 0


def test_certify_and_attack_say_their_figures(certified: Path, lipllm: Command) -> None:
    """Oracle: the certificate's numbers in the log that the terminal shows."""
    certificate = load_bundle(certified).certificate
    assert certificate is not None
    done = lipllm("certify", f"bundle={certified}", *CHEAP)
    log = (done.directory / "certify.log").read_text()
    assert f"tightened {certificate.tightened:.6g}, naive {certificate.naive:.6g}" in log
    done = lipllm("attack", f"bundle={certified}", *BRIEF)
    log = (done.directory / "attack.log").read_text()
    assert f"proved: at most {certificate.tightened:.6g}" in log
