"""The compress command on a tiny bundle."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import compress
from common.bundle import Bundle, extend_bundle, load_bundle, save_bundle
from common.errors import CertificateError, ConfigError, DataError
from common.ledger import Run
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from common.tracking import is_declared
from compress.app import compress as command
from compress.statistics.collect import split_held
from solvers.bounds import certify, verify

CONF = Path(__file__).parents[2] / "conf" / "compress"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Bundle:
    """Return a certified byte model, untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=256,
            width=16,
            layers=2,
            heads=2,
            context=32,
            activation="maxmin",
            mlp_bias=True,
        )
        model = LipschitzTransformer(config)
    path = tmp_path_factory.mktemp("dense") / "bundle"
    return save_bundle(path, model, ByteTokenizer(), certificate=certify(model, tighten=False))


@pytest.fixture
def text(tmp_path) -> Path:
    """Return a file of readable text."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the square is {i * i}\n" for i in range(2000)))
    return path


def configure(bundle: Bundle, text: Path, tmp_path: Path, option: str = "default", **changes):
    """Return the command's configuration and run, with a tiny calibration."""
    node = OmegaConf.load(CONF / "default.yaml")
    if option != "default":
        node = OmegaConf.merge(node, OmegaConf.load(CONF / f"{option}.yaml"))
        node.pop("defaults")
    node = OmegaConf.merge(node, {"tokens": 4096, "eval_tokens": 512, "rounds": 1}, changes)
    cfg = OmegaConf.create(
        {
            "bundle": str(bundle.path),
            "device": "cpu",
            "seed": 0,
            "compress": node,
            "data": {
                "_target_": "common.corpus.DataConfig",
                "source": "local",
                "path": str(text),
                "cache": str(tmp_path / "cache"),
            },
        }
    )
    OmegaConf.set_readonly(cfg, True)
    directory = tmp_path / "run"
    directory.mkdir()
    return cfg, Run(command="compress", directory=directory, config={}, config_hash="")


def test_command_writes_a_smaller_bundle_that_certifies(dense, text, tmp_path):
    """Files, metrics, order of the three deviations, and a new certificate that verifies."""
    outcome = command(*configure(dense, text, tmp_path, frontier=[]))
    for name in outcome.metrics:
        assert is_declared(name), name
    metrics = {name.removeprefix("compress/"): value for name, value in outcome.metrics.items()}
    assert metrics["removed_fraction"] == pytest.approx(0.25, abs=0.02)
    assert metrics["params"] < metrics["params_before"]
    assert metrics["bundle_bytes"] < 1
    assert 0 < metrics["measured_deviation"] <= metrics["semi_empirical_deviation"]
    assert metrics["semi_empirical_deviation"] <= metrics["certified_deviation"]
    assert outcome.objective == metrics["val_bits_per_byte"]
    pruned = load_bundle(outcome.artifacts["bundle"])
    assert pruned.certificate.tightened == metrics["tightened"] <= metrics["naive"]
    assert pruned.manifest["parent"] == dense.fingerprint
    widths = [pruned.config.layer(i).mlp_width for i in range(2)]
    assert [len(layer["kept"]) for layer in pruned.compression["layers"]] == widths
    assert pruned.compression["certified_deviation"] == metrics["certified_deviation"]
    assert verify(pruned).tightened <= dense.certificate.naive * (1 + 1e-6)
    assert metrics["flops_fraction"] < 1
    assert metrics["forward_speedup"] > 0 < metrics["decode_speedup"]


def test_frontier_is_ordered_and_complete(dense, text, tmp_path):
    """One record per budget, the main one included; fewer parameters in each next one."""
    cfg, run = configure(dense, text, tmp_path, frontier=[0.5, 0.75])
    outcome = command(cfg, run)
    points = json.loads(outcome.artifacts["frontier"].read_text())
    assert [point["keep"] for point in points] == [0.75, 0.5]
    removed = [point["removed_fraction"] for point in points]
    assert removed == sorted(removed)
    for point in points:
        assert point["measured_deviation"] <= point["certified_deviation"]
        assert point["cert_naive"] > 0
        assert point["val_bits_per_byte"] > 0


@pytest.mark.parametrize("source", ["model", "random"])
def test_heads_go_and_no_text_is_needed_to_calibrate(dense, text, tmp_path, source):
    """Half the heads under one budget for all; the record names heads and neurons."""
    changes = {"keep": 0.5, "keep_heads": None, "calibration": source, "frontier": []}
    outcome = command(*configure(dense, text, tmp_path, **changes))
    pruned = load_bundle(outcome.artifacts["bundle"])
    assert [pruned.config.layer(index).heads for index in range(2)] == [1, 1]
    assert outcome.metrics["compress/heads_removed"] == 2
    kinds = {layer["kind"] for layer in pruned.compression["layers"]}
    assert kinds == {"heads", "mlp"}
    verify(pruned)


def test_keeping_everything_reproduces_the_logits_bit_for_bit(dense, text, tmp_path):
    """``keep=1``: the same weights, all deviations exactly 0."""
    outcome = command(*configure(dense, text, tmp_path, keep=1.0, frontier=[]))
    pruned = load_bundle(outcome.artifacts["bundle"])
    tokens_BT = torch.arange(64).reshape(2, 32)
    assert torch.equal(pruned.model(tokens_BT), dense.model(tokens_BT))
    for kind in ("measured", "semi_empirical", "certified"):
        assert outcome.metrics[f"compress/{kind}_deviation"] == 0.0
    assert outcome.metrics["compress/removed_fraction"] == 0.0


def test_paper_preset_is_the_published_method(dense, text, tmp_path):
    """Singleton scores, plain least squares, one fraction for all layers."""
    outcome = command(*configure(dense, text, tmp_path, "paper", frontier=[]))
    record = load_bundle(outcome.artifacts["bundle"]).compression
    assert record["settings"]["score"] == "singleton"
    assert record["settings"]["comp"] == "lsq"
    assert {layer["width"] for layer in record["layers"]} == {48}


def test_the_same_settings_give_the_same_bundle(dense, text, tmp_path):
    """Determinism up to the bytes of the record and the weights."""
    prints = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        outcome = command(*configure(dense, text, tmp_path / name, frontier=[]))
        pruned = load_bundle(outcome.artifacts["bundle"])
        prints.append((pruned.fingerprint, json.dumps(pruned.compression, sort_keys=True)))
    assert prints[0] == prints[1]


def test_exported_prune_chooses_a_neighbouring_directory(dense, tmp_path):
    """The Python entry point, with the default path and calibration text for measuring."""
    near = save_bundle(tmp_path / "model", dense.model, dense.tokenizer)
    near = extend_bundle(near.path, certificate=dense.certificate)
    tokens_BT = torch.randint(256, (64, 32), generator=torch.Generator().manual_seed(0))
    pruned, report = compress.prune(near, compress.CompressConfig(keep=0.5), tokens_BT)
    assert pruned.path == tmp_path.resolve() / "model-pruned"
    assert report.removed_fraction == pytest.approx(0.5, abs=0.02)
    assert set(pruned.compression) > set(report.to_dict()) - {"layers"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keep": 0.0}, ConfigError, "compress.keep=0.0"),
        ({"keep": 1.5}, ConfigError, "expected 0.0 to 1.0"),
        ({"frontier": [0.5, -1]}, ConfigError, "compress.frontier=-1.0"),
        ({"tau": -1.0}, ConfigError, "above 0, or inf"),
        ({"score": "best"}, ConfigError, "compress.score='best': expected one of"),
        ({"calibration": "web"}, ConfigError, "compress.calibration='web'"),
        ({"keep_heads": 2.0}, ConfigError, "compress.keep_heads=2.0"),
        ({"tokens": "many"}, ConfigError, "compress.tokens='many'"),
        ({"ratio": 2}, ConfigError, "ratio"),
        ({"length": 33}, ConfigError, "compress.length=33: expected at most .* context of 32"),
        ({"keep": 0.5, "min_keep": 0.9, "align": 64}, ConfigError, "least kept numbers"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    dense, text, tmp_path, changes, error, message
):
    """One line that names the value and what was expected."""
    cfg, run = configure(dense, text, tmp_path, **changes)
    with pytest.raises(error, match=message) as info:
        command(cfg, run)
    assert "\n" not in str(info.value)
    assert not any(run.directory.iterdir())


def test_bundles_that_cannot_be_pruned_name_the_remedy(dense, text, tmp_path):
    """No certificate, of a transformer and of a classifier."""
    bare = save_bundle(tmp_path / "bare", dense.model, dense.tokenizer)
    cfg, run = configure(bare, text, tmp_path)
    with pytest.raises(CertificateError, match="run: lipllm certify bundle="):
        command(cfg, run)
    classifier = save_bundle(tmp_path / "image", LipschitzMLP((4, 8, 2)))
    with pytest.raises(CertificateError, match="run: lipllm certify bundle="):
        compress.prune(classifier, compress.CompressConfig(), torch.zeros(4, 4))


def test_bias_needs_a_model_with_biases(make_model, tmp_path):
    """The remedy names both ways out."""
    model = make_model("relu", bias=False, vocab_size=256)
    path = tmp_path / "model"
    bundle = save_bundle(path, model, ByteTokenizer(), certificate=certify(model, tighten=False))
    settings = compress.CompressConfig(bias=True)
    with pytest.raises(ConfigError, match=r"model\.mlp_bias=true"):
        compress.prune(bundle, settings, torch.zeros(4, 16, dtype=torch.long))


def test_calibration_without_a_sequence_is_refused():
    """Nothing to calibrate on."""
    with pytest.raises(DataError, match="0 calibration sequences"):
        split_held(torch.zeros(0, 8, dtype=torch.long), 0.1)
