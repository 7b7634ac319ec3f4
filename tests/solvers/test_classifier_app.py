"""Every command on a bundle that holds a classifier: a proof, or one clear line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.bundle import load_bundle, save_bundle
from common.models import LipschitzMLP

Command = Callable[..., Any]
Flip = Callable[[Path, str], None]
CHEAP = ("certify.attack_steps=5", "certify.attack_network_steps=3")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle with an untrained classifier of digits' size."""
    torch.manual_seed(0)
    save_bundle(tmp_path / "model", LipschitzMLP((64, 12, 8, 10), "maxmin"))
    return tmp_path / "model"


def test_certify_verify_attack_and_tampering(bundle: Path, lipllm: Command, flip_bit: Flip) -> None:
    """Oracle: attack <= tightened <= naive; the stored proof; exit 2 naming what was changed."""
    done = lipllm("certify", f"bundle={bundle}", *CHEAP)
    assert done.status == 0, done.err
    metrics = done.metrics
    certificate = load_bundle(bundle).certificate
    for name in ("reference", "naive", "tightened", "attack", "naive_l2", "tightened_l2"):
        assert metrics[f"cert/{name}"] == getattr(certificate, name)
    assert 0 < metrics["cert/attack"] <= metrics["cert/tightened"] < metrics["cert/naive"]
    assert metrics["cert/pair_l2"] <= 1.4143 * metrics["cert/tightened_l2"]
    checked = lipllm("verify", f"bundle={bundle}")
    assert checked.status == 0, checked.err
    assert checked.metrics["verify/tightened"] == certificate.tightened
    attacked = lipllm("attack", f"bundle={bundle}", "attack.steps=5", "attack.network_steps=3")
    assert attacked.status == 0, attacked.err
    assert 0 < attacked.metrics["attack/best"] <= certificate.tightened
    reported = lipllm("report", f"run={done.directory}")
    assert reported.status == 0, reported.err
    for file, tensor in (
        ("certificate.safetensors", "blocks.0.1"),
        ("model.safetensors", "linears.1.weight"),
    ):
        flip_bit(bundle / file, tensor)
        spoiled = lipllm("verify", f"bundle={bundle}")
        assert spoiled.status == 2
        assert f"tensor {tensor}" in spoiled.err
        assert len(spoiled.err.strip().splitlines()) == 1
        flip_bit(bundle / file, tensor)
    path = bundle / "certificate.json"
    content = json.loads(path.read_text())
    content["tightened"] *= 0.99
    path.write_text(json.dumps(content))
    assert "tightened=" in lipllm("verify", f"bundle={bundle}").err


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",),
        ("compress", "data=stdlib"),
        ("calibrate", "data=stdlib"),
        ("generate", "data=stdlib", "logger=none"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_for_text_refuse_a_classifier(
    bundle: Path, lipllm: Command, arguments: tuple[str, ...]
) -> None:
    """Oracle: exit status 2 and one line; without a certificate there is nothing to verify."""
    done = lipllm(*arguments, f"bundle={bundle}")
    assert done.status == 2
    assert len(done.err.strip().splitlines()) == 1
    assert "classifier" in done.err or "certify" in done.err
