"""The compress command on a small classifier of digits."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.bundle import load_bundle, save_bundle
from common.errors import ConfigError
from common.ledger import Run
from common.models import LipschitzMLP
from common.tracking import is_declared
from compress.app import compress
from solvers.bounds import certify, verify

CONF = Path(__file__).parents[2] / "conf" / "compress" / "default.yaml"
DIGITS = {"_target_": "common.images.ImageConfig", "source": "digits"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return a certified, untrained classifier of digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LipschitzMLP((64, 32, 16, 10), "relu")
    path = tmp_path_factory.mktemp("dense") / "bundle"
    return save_bundle(path, model, certificate=certify(model, tighten=False))


def configure(dense, tmp_path, data=DIGITS, **changes):
    """Return configuration and run."""
    node = OmegaConf.merge(OmegaConf.load(CONF), {"tokens": 20000}, changes)
    cfg = {"bundle": str(dense.path), "device": "cpu", "seed": 0, "compress": node, "data": data}
    directory = tmp_path / "run"
    directory.mkdir(parents=True)
    run = Run(command="compress", directory=directory, config={}, config_hash="")
    return OmegaConf.create(cfg), run


@pytest.mark.parametrize("source", ["data", "random"])
def test_a_classifier_is_pruned_under_its_certificate(dense, tmp_path, source):
    """Measured <= certified, a new certificate that verifies, naive not larger than the dense."""
    outcome = compress(*configure(dense, tmp_path, keep=0.5, calibration=source))
    for name in outcome.metrics:
        assert is_declared(name), name
    metrics = {name.removeprefix("compress/"): value for name, value in outcome.metrics.items()}
    assert metrics["measured_deviation"] <= metrics["certified_deviation"]
    pruned = load_bundle(outcome.artifacts["bundle"])
    assert pruned.model.sizes == (64, 16, 8, 10)
    assert pruned.compression["certified_deviation"] == metrics["certified_deviation"]
    assert verify(pruned).naive <= dense.certificate.naive * (1 + 1e-6)
    assert outcome.objective == pytest.approx(1 - metrics["val_accuracy"])
    assert metrics["flops_fraction"] == (64 * 16 + 16 * 8 + 80) / (64 * 32 + 32 * 16 + 160)
    assert metrics["forward_speedup"] > 0


def test_the_frontier_has_every_budget_within_reach(dense, tmp_path, caplog):
    """Oracle: the settings; each budget proves, measures and times a smaller model."""
    changes = {"keep": 0.75, "frontier": [0.5, 0.75, 0.25], "rounds": 1}
    outcome = compress(*configure(dense, tmp_path, **changes))
    points = json.loads(outcome.artifacts["frontier"].read_text())
    assert [point["keep"] for point in points] == [0.75, 0.5, 0.25]
    assert [point["order"] for point in points] == ["sequential", "one_shot", "one_shot"]
    fractions = [point["params_fraction"] for point in points]
    assert fractions == sorted(fractions, reverse=True)
    for point in points:
        assert point["measured_deviation"] <= point["certified_deviation"]
        assert point["cert_naive"] <= dense.certificate.naive * (1 + 1e-6)
        assert point["cert_tightened_before"] == dense.certificate.tightened
        assert min(point["val_accuracy"], point["forward_speedup"]) >= 0
    assert points[0]["val_accuracy"] == outcome.metrics["compress/val_accuracy"]
    coarse = {"frontier": [0.1, 0.7], "align": 16, "rounds": 1}
    few = compress(*configure(dense, tmp_path / "few", **coarse))
    assert "0.1 left out: compress.keep=0.1: expected at least 0.6" in caplog.text
    kept = [point["keep"] for point in json.loads(few.artifacts["frontier"].read_text())]
    assert kept == [0.75, 0.7]
    one = compress(*configure(dense, tmp_path / "one", **changes | {"frontier": []}))
    assert len(json.loads(one.artifacts["frontier"].read_text())) == 1


def test_text_other_images_and_sampling_are_refused(dense, tmp_path):
    """One line each, and nothing is written."""
    text = {"_target_": "common.corpus.DataConfig", "source": "stdlib", "tokenizer": "byte"}
    other = save_bundle(tmp_path / "other", model := LipschitzMLP((4, 8, 2)))
    other = save_bundle(other.path, model, certificate=certify(model, tighten=False))
    for number, (bundle, data, changes, message) in enumerate(
        (
            (dense, text, {}, "expected images"),
            (other, DIGITS, {}, "images of 64 pixels, expected 4"),
            (dense, DIGITS, {"calibration": "model"}, "choose data or random"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        cfg, run = configure(bundle, folder, data, **changes)
        with pytest.raises(ConfigError, match=message):
            compress(cfg, run)
        assert not any(run.directory.iterdir())
