"""Text in; a certified, pruned, served model and its report out: on a tiny model, in seconds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.bundle import load_bundle

STAGES = ("train", "certify", "compress", "recertify", "calibrate", "generate", "report")
TINY = (
    "model=nano",
    "logger=csv",
    "data=shakespeare",
    "device=cpu",
    "trainer.max_steps=20",
    "trainer.batch_size=8",
    "trainer.val_every=0",
    "trainer.final_windows=64",
    "callbacks.certificate_every=10",
    "callbacks.sample_every=0",
    "certify.max_evals=20",
    "certify.attack_steps=4",
    "certify.attack_network_steps=2",
    "attack.steps=2",
    "attack.network_steps=2",
    "attack.tokens=8",
    "compress.keep=0.75",
    "compress.tokens=1024",
    "compress.eval_tokens=256",
    "compress.frontier=[]",
    "calibrate.tokens=1024",
    "kv.budget=8",
    "kv.interval=2",
    "kv.sinks=2",
    "kv.window=4",
    "sampling.max_tokens=6",
    "generate.num_prompts=1",
    "generate.prompt_tokens=8",
    "generate.eval_windows=1",
    "generate.eval_tokens=16",
    "generate.frontier=[]",
)
NAMES = (
    "data/unigram_entropy_bits",
    "train/val_bits_per_byte",
    "train/val_acc_full",
    "train/tokens_per_s",
    "cert/reference",
    "compress/removed_fraction",
    "compress/val_bits_per_byte",
    "serve/kv_kept_fraction",
    "serve/kl_vs_full",
    "serve/tokens_per_s",
)
SLACK = 1 + 1e-9  # the checker's rounding margin is far below this

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the tests of this module share."""
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture
def start(
    folder: Path, text_file: Path, lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return a function that runs the tiny pipeline with further overrides."""
    monkeypatch.chdir(folder)
    return lambda *extra: lipllm("pipeline", *TINY, f"data.path={text_file}", *extra)


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/pipeline/demo/summary.json").read_text())


def test_pipeline_carries_the_proof_through(start: Callable[..., Any], folder: Path) -> None:
    """Oracle: the chain attack <= tightened <= naive, measured <= certified, dense and pruned."""
    done = start()
    assert done.status == 0, done.err[-2000:]
    metrics = _summary(folder)["metrics"]
    assert set(NAMES) <= set(metrics)
    for prefix in ("", "compress/"):
        attack, tightened, naive = (
            metrics[f"{prefix}cert/{name}"] for name in ("attack", "tightened", "naive")
        )
        assert 0 < attack <= tightened * SLACK
        assert tightened <= naive * SLACK
    for stage in ("compress", "serve"):
        measured = metrics[f"{stage}/measured_deviation"]
        assert 0 <= measured <= metrics[f"{stage}/certified_deviation"] * SLACK
    assert 0 < metrics["compress/removed_fraction"] < 1
    assert metrics["train/val_bits_per_byte"] < metrics["data/unigram_entropy_bits"]


def test_artifacts_exist_and_load(start: Callable[..., Any], folder: Path) -> None:
    """Oracle: the bundles load with every hash checked, and the report is one HTML file."""
    assert start().status == 0
    artifacts = _summary(folder)["artifacts"]
    base = folder / "runs/pipeline/demo"
    dense, pruned = (load_bundle(base / artifacts[name]) for name in ("bundle_dense", "bundle"))
    assert dense.certificate is not None
    assert pruned.certificate is not None
    assert pruned.kv_stats
    assert pruned.model.num_parameters < dense.model.num_parameters
    assert (base / artifacts["report"]).read_text(encoding="utf-8").lstrip().startswith("<!")


def test_second_run_skips_every_stage(start: Callable[..., Any], folder: Path) -> None:
    """Oracle: the stages' summaries stay byte for byte, and each is said to be skipped."""
    assert start().status == 0
    files = [folder / f"runs/pipeline/demo/{stage}/summary.json" for stage in STAGES]
    before = [path.read_bytes() for path in files]
    again = start()
    assert again.status == 0
    assert all(f"{stage}: already finished, skipped" in again.out for stage in STAGES)
    assert [path.read_bytes() for path in files] == before


def test_late_change_redoes_what_follows(start: Callable[..., Any], folder: Path) -> None:
    """Oracle: only the stages at and after the changed one run again."""
    assert start().status == 0
    done = start("kv.budget=10")
    assert done.status == 0, done.err[-2000:]
    assert "calibrate: already finished, skipped" in done.out
    assert "generate: finished" in done.out


def test_verify_tells_a_flipped_bit(
    start: Callable[..., Any], lipllm: Callable[..., Any], folder: Path
) -> None:
    """Oracle: exit status 0 for the bundle, 2 after one bit of one weight is flipped."""
    assert start().status == 0
    bundle = folder / "damaged"
    shutil.copytree(folder / "runs/pipeline/demo/train/bundle", bundle, dirs_exist_ok=True)
    assert lipllm("verify", f"bundle={bundle}").status == 0
    weights = bundle / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    done = lipllm("verify", f"bundle={bundle}")
    assert done.status == 2
    assert "weight tensor" in done.err
