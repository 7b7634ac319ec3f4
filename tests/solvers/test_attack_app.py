"""Command attack with data: curves as an artifact, the bundle's tokenizer, one-line refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.bundle import load_bundle, save_bundle
from common.metric_names import METRICS
from common.models import LipschitzMLP, LipschitzTransformer
from common.report import ReportConfig, story_page
from common.reporting.runs import read_story
from common.tokenizer import ByteTokenizer, CharTokenizer
from solvers import attack_app
from solvers.bounds import certify

CHEAP = (
    "attack.steps=1",
    "attack.network_steps=1",
    "attack.restarts=2",
    "attack.tokens=8",
    "robustness.tokens=64",
    "robustness.attack_tokens=16",
    "robustness.steps=3",
    "robustness.restarts=1",
    "robustness.points=7",
    "robustness.text_epsilons=[0.01,0.2]",
)

BuildModel = Callable[..., LipschitzTransformer]
Command = Callable[..., Any]


@pytest.fixture
def model(build_model: BuildModel) -> LipschitzTransformer:
    """Return a model of bytes."""
    return build_model(vocab_size=256, width=8, layers=1, heads=2, norm=0.7).float()


@pytest.fixture
def bundle(tmp_path: Path, model: LipschitzTransformer) -> Path:
    """Return a certified bundle of bytes."""
    certificate = certify(model, tighten=False)
    return save_bundle(tmp_path / "model", model, ByteTokenizer(), certificate=certificate).path


def test_text_leaves_curves_and_metrics(bundle: Path, text_file: Path, lipllm: Command) -> None:
    """Oracle: declared names, the file's own consistency, and the report that draws it."""
    done = lipllm("attack", f"bundle={bundle}", "data=local", f"data.path={text_file}", *CHEAP)
    assert done.status == 0, done.err
    directory = done.directory
    summary = json.loads((directory / "summary.json").read_text())
    metrics, content = summary["metrics"], json.loads((directory / "robustness.json").read_text())
    assert summary["artifacts"] == {"robustness": "robustness.json"}
    promised = {n for n in METRICS if n.startswith("robust/")} - {"robust/median_radius"}
    assert promised <= set(metrics)
    assert metrics["attack/best"] > 0
    assert metrics["robust/inputs"] == content["inputs"] == 64
    assert {c["domain"] for c in content["curves"]} == {"ball", "space"}
    assert len(content["points"]) == 4
    for p in content["points"]:
        assert p["certified_acc"] <= p["pgd_acc"] <= p["clean_acc"]
        assert metrics[f"robust/pgd_acc/{p['norm']}_{p['label']:g}"] == p["pgd_acc"]
    certificate = load_bundle(bundle).certificate
    assert certificate is not None
    assert f"l2 radius {certificate.radius:.6g}" in content["statement"]
    page = story_page(read_story(directory), ReportConfig())
    assert "Robustness" in page
    assert "could not be drawn" not in page
    assert page.count("<svg") >= 2


def test_the_bundle_s_tokenizer_reads_the_corpus(
    tmp_path: Path, build_model: BuildModel, text_file: Path, lipllm: Command
) -> None:
    """Oracle: a character model with few tokens would be out of range with the data's bytes."""
    tokenizer = CharTokenizer("".join(sorted(set(text_file.read_text()))))
    model = build_model(
        vocab_size=tokenizer.vocab_size, width=8, layers=1, heads=2, norm=0.7
    ).float()
    path = save_bundle(
        tmp_path / "char", model, tokenizer, certificate=certify(model, tighten=False)
    ).path
    data = ("data=local", f"data.path={text_file}", "data.tokenizer=byte")
    done = lipllm("attack", f"bundle={path}", *data, *CHEAP)
    assert done.status == 0, done.err
    content = json.loads((done.directory / "robustness.json").read_text())
    assert all(len(text) == 1 for swap in content["swaps"] for text in swap["text"])


def test_without_data_it_says_what_is_missing(bundle: Path, lipllm: Command) -> None:
    """Oracle: the old metrics alone, no file, and a line that names the setting."""
    done = lipllm("attack", f"bundle={bundle}", *CHEAP)
    assert done.status == 0, done.err
    directory = done.directory
    metrics = json.loads((directory / "summary.json").read_text())["metrics"]
    assert all(name.startswith("attack/") for name in metrics)
    assert not (directory / "robustness.json").exists()
    assert "data=NAME" in (directory / "attack.log").read_text()
    page = story_page(read_story(directory), ReportConfig())
    assert "data=NAME" in page


def test_refusals_are_one_line(
    tmp_path: Path,
    model: LipschitzTransformer,
    bundle: Path,
    text_file: Path,
    lipllm: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: exit status 2 and the remedy, before any search: wrong or missing data, no proof."""
    monkeypatch.setattr(attack_app, "_lipschitz", None)
    save_bundle(tmp_path / "bare", model, ByteTokenizer())
    text = ("data=local", f"data.path={text_file}")
    for name, data, remedy in (
        ("model", ("data=digits",), "expected text"),
        ("bare", text, "lipllm certify"),
        (bundle.name, ("data=local", "data.path=/none.txt"), "correct the path"),
    ):
        done = lipllm("attack", f"bundle={tmp_path / name}", *data, *CHEAP)
        assert done.status == 2
        assert remedy in done.err
        assert len(done.err.strip().splitlines()) == 1


def test_images_leave_curves(tmp_path: Path, lipllm: Command) -> None:
    """Oracle: digits of scikit-learn; order of certified, attacked and clean accuracy."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    path = save_bundle(tmp_path / "digits", LipschitzMLP([64, 16, 10])).path
    settings = ("robustness.images=50", "robustness.attack_images=20", *CHEAP)
    done = lipllm("attack", f"bundle={path}", "data=digits", *settings)
    assert done.status == 0, done.err
    directory = done.directory
    content = json.loads((directory / "robustness.json").read_text())
    assert (content["kind"], content["inputs"]) == ("classifier", 50)
    assert {p["inputs"] for p in content["points"]} == {20}
    for p in content["points"]:
        assert p["certified_acc"] <= p["pgd_acc"] <= p["clean_acc"]
    page = story_page(read_story(directory), ReportConfig())
    assert "could not be drawn" not in page
    assert page.count("<svg") >= 2
