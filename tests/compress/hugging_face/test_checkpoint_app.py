"""The compress command on checkpoints of transformers: plain reload, honest record."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from common.errors import ConfigError
from common.ledger import Run
from common.tracking import is_declared
from compress import checkpoint_app
from compress import frontier as frontier_module
from compress.app import compress
from compress.pruner import prune_model

CONF = Path(__file__).parents[3] / "conf" / "compress" / "default.yaml"


def configure(folder: Path, tmp_path: Path, **changes):
    """Return configuration and run."""
    changes = {"tokens": 1024, "length": 16, "calibration": "random", **changes}
    cfg = {
        "bundle": str(folder),
        "device": "cpu",
        "seed": 0,
        "compress": OmegaConf.merge(OmegaConf.load(CONF), changes),
        "data": {"_target_": "common.corpus.DataConfig", "source": "stdlib", "tokenizer": "byte"},
    }
    directory = tmp_path / "run"
    directory.mkdir(parents=True)
    run = Run(command="compress", directory=directory, config={}, config_hash="")
    return OmegaConf.create(cfg), run


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("source", ["random", "model"])
def test_a_checkpoint_becomes_a_smaller_ordinary_one(make_decoder, tmp_path, family, source):
    """Oracle: plain transformers loads the result; nothing in the record is called certified."""
    import transformers

    make_decoder(family).save_pretrained(tmp_path / "dense")
    cfg, run = configure(tmp_path / "dense", tmp_path, keep=0.5, keep_heads=0.5, calibration=source)
    outcome = compress(cfg, run)
    for name in outcome.metrics:
        assert is_declared(name), name
    folder = outcome.artifacts["checkpoint"]
    small = transformers.AutoModelForCausalLM.from_pretrained(folder)
    params = sum(tensor.numel() for tensor in small.parameters())
    assert params == outcome.metrics["compress/params"] < outcome.metrics["compress/params_before"]
    record = json.loads((folder / "compression.json").read_text())
    assert record["certified_deviation"] is None
    assert record["settings"]["calibration"] == source
    assert {layer["kind"] for layer in record["layers"]} == {"heads", "mlp"}
    tokens_BT = torch.arange(8)[None]
    assert torch.isfinite(small(tokens_BT).logits).all()


def test_the_frontier_prunes_anew_at_every_budget(make_decoder, tmp_path):
    """Oracle: the same budget as a run of its own; operations of the smaller shapes."""
    make_decoder("llama").save_pretrained(tmp_path / "dense")
    frontiers = []
    for keep, frontier in ((0.75, [0.5]), (0.5, [])):
        changes = {"keep": keep, "frontier": frontier, "rounds": 1}
        cfg, run = configure(tmp_path / "dense", tmp_path / f"{keep}", **changes)
        outcome = compress(cfg, run)
        frontiers.append(json.loads(outcome.artifacts["frontier"].read_text()))
    (main, further), (alone,) = frontiers
    assert [main["keep"], further["keep"], alone["keep"]] == [0.75, 0.5, 0.5]
    timed = "forward_speedup"
    assert {**further, timed: 0} == {**alone, timed: 0}
    assert 0 < further["flops_fraction"] < main["flops_fraction"] < 1
    assert "val_bits_per_byte" not in main
    assert outcome.metrics["compress/flops_fraction"] == alone["flops_fraction"]


def test_the_frontier_keeps_no_earlier_model(make_decoder, tmp_path, monkeypatch):
    """Oracle: references to the models before, when the next one is about to be made."""
    make_decoder("llama").save_pretrained(tmp_path / "dense")
    made, alive = [], []

    def watched(*args, **options):
        gc.collect()
        alive.append(sum(model() is not None for model in made))
        pruning = prune_model(*args, **options)
        made.append(weakref.ref(pruning.model))
        return pruning

    monkeypatch.setattr(checkpoint_app, "prune_model", watched)
    monkeypatch.setattr(frontier_module, "prune_model", watched)
    compress(*configure(tmp_path / "dense", tmp_path, frontier=[0.5, 0.25], rounds=1))
    assert alive == [0, 0, 0]


def test_too_long_sequences_name_the_setting(make_decoder, tmp_path):
    """The key that the user set, before anything is run."""
    make_decoder("gpt2").save_pretrained(tmp_path / "dense")
    cfg, run = configure(tmp_path / "dense", tmp_path, length=65)
    with pytest.raises(ConfigError, match=r"compress\.length=65: expected at most .* 64 tokens"):
        compress(cfg, run)


def test_text_needs_the_checkpoints_tokenizer(make_decoder, tmp_path):
    """The remedy names the file and the other sources."""
    make_decoder("llama").save_pretrained(tmp_path / "dense")
    cfg, run = configure(tmp_path / "dense", tmp_path, calibration="data")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in it"):
        compress(cfg, run)
    assert not any(run.directory.iterdir())


def test_a_certified_allocation_needs_a_certificate(make_decoder, tmp_path):
    """Checkpoints of transformers have none."""
    make_decoder("llama").save_pretrained(tmp_path / "dense")
    cfg, run = configure(tmp_path / "dense", tmp_path, allocation="certified")
    with pytest.raises(ConfigError, match="a model with a certificate"):
        compress(cfg, run)
