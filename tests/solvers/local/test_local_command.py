"""``lipllm certify around.text=...`` and ``lipllm verify around=DIR`` on bundles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.bundle import save_bundle
from common.models import LipschitzMLP, LipschitzTransformer
from common.tokenizer import ByteTokenizer
from solvers.bounds import certify
from solvers.bounds.local import LocalCertificate
from solvers.bounds.network import TightenSettings

CHEAP = ("around.levels=3", "around.cells=1", "around.max_evals=1")

BuildModel = Callable[..., LipschitzTransformer]
Command = Callable[..., Any]


@pytest.fixture
def bundle(tmp_path: Path, build_model: BuildModel) -> Path:
    """Return a certified bundle of a tiny byte model."""
    model = build_model(vocab_size=256, width=8, layers=1, heads=2, mlp_width=12).float()
    certificate = certify(model, settings=TightenSettings(max_evals=1))
    save_bundle(tmp_path / "model", model, ByteTokenizer(), certificate=certificate)
    return tmp_path / "model"


def _run(out: str) -> tuple[Path, dict[str, Any]]:
    path = Path(out.strip().splitlines()[-1].removeprefix("summary: "))
    return path.parent, dict(json.loads(path.read_text()))


def test_certify_around_prompts_and_verify(bundle: Path, lipllm: Command) -> None:
    """Oracle: the records in the run directory, and the checker in another process's place."""
    done = lipllm("certify", f"bundle={bundle}", "around.text=ab", "around.prompts=[xyz]", *CHEAP)
    assert done.status == 0, done.err
    directory, summary = _run(done.out)
    records = [LocalCertificate.load(directory / f"around-{index}") for index in range(2)]
    assert [record.tokens for record in records] == [(97, 98), (120, 121, 122)]
    metrics = summary["metrics"]
    assert metrics["local/positions"] == 5
    assert metrics["local/median_radius"] >= metrics["local/median_global_radius"] > 0
    assert metrics["local/radius_gain"] >= 1
    for record in records:
        for radius, coarse in zip(record.radii, record.global_radii, strict=True):
            assert f"{radius:10.4g} {coarse:10.4g}" in done.out
    checked = lipllm("verify", f"bundle={bundle}", f"around={directory}")
    assert checked.status == 0, checked.err
    assert _run(checked.out)[1]["metrics"]["local/positions"] == 5


def test_verify_names_a_forged_record(bundle: Path, lipllm: Command) -> None:
    """Oracle: exit status 2 and one line with the record and the position."""
    directory, _ = _run(lipllm("certify", f"bundle={bundle}", "around.text=ab", *CHEAP).out)
    path = directory / "around-0" / "local.json"
    content = json.loads(path.read_text())
    content["radii"][1] *= 1.001
    path.write_text(json.dumps(content))
    done = lipllm("verify", f"bundle={bundle}", f"around={directory}")
    assert done.status == 2
    assert "around-0" in done.err
    assert "radii[1]" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("around.text=''",), "at least one character"),
        (("around.text=abcdefghijklmnopqrstuvwxyz",), "context of 16"),
        (("around.text=a", "around.radius=wide"), "around.radius"),
        (("around.text=a", "around.radius=-1"), "radius=-1"),
        (("around.text=a", "around.radius=1e60"), "around.radius=1e+60"),
        (("around.text=a", "around.levels=none"), "around.levels"),
        (("around.text=a", "around.method=magic"), "magic"),
        (("around.prompts=3",), "around.prompts"),
    ],
)
def test_mistakes_end_with_one_line(
    bundle: Path, lipllm: Command, arguments: tuple[str, ...], message: str
) -> None:
    """Oracle: exit status 2, the key and its value."""
    done = lipllm("certify", f"bundle={bundle}", *arguments)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_what_is_missing_is_named(
    bundle: Path, lipllm: Command, tmp_path: Path, build_model: BuildModel
) -> None:
    """Oracle: the remedy in the line: certify first, a run directory, a language model."""
    done = lipllm("verify", f"bundle={bundle}", f"around={tmp_path / 'nowhere'}")
    assert (done.status, "nowhere" in done.err) == (2, True)
    model = build_model(vocab_size=256, width=8, layers=1, heads=2)
    save_bundle(tmp_path / "bare", model.float(), ByteTokenizer())
    done = lipllm("certify", f"bundle={tmp_path / 'bare'}", "around.text=a")
    assert done.status == 2
    assert "run first: lipllm certify" in done.err
    save_bundle(tmp_path / "images", LipschitzMLP((4, 3, 2)))
    done = lipllm("certify", f"bundle={tmp_path / 'images'}", "around.text=a")
    assert done.status == 2
    assert "language models" in done.err
