"""Checkpoints: ordinary ones for everybody, others through the manifest, damage, refusals."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from common import files
from common.checkpoints import is_checkpoint
from common.errors import BundleError, ConfigError, LipError
from compress.adapters import adapter_for
from compress.checkpoints.checkpoint import is_ordinary, load_hf, save_hf
from compress.checkpoints.manifest import MANIFEST
from compress.pruner import prune_model
from compress.settings import CompressConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
SINGLE = 1e-5
"""Float32 logits of size one, summed in another order."""


def halved(model: Any, *, layers: tuple[int, ...] = (0, 1)) -> Any:
    """Return the model with the first half of every target kept in some layers."""
    adapter = adapter_for(model)
    targets = [target for target in adapter.targets() if target.layer in layers]
    return adapter.cut({target.name: torch.arange(target.inputs // 2) for target in targets})


def generated(model: Any, *, cache: bool) -> Tensor:
    """Return greedy continuations of two prompts."""
    prompt_BT = torch.arange(10).reshape(2, 5)
    mask_BT = torch.ones_like(prompt_BT)
    return model.generate(
        prompt_BT,
        attention_mask=mask_BT,
        max_new_tokens=12,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )


def assert_same_weights(first: Any, second: Any) -> None:
    """Compare every tensor bit for bit."""
    old, new = first.state_dict(), second.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype
        assert torch.equal(tensor, new[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_reload_in_plain_transformers(
    transformers, make_decoder, tokens_BT, logits, tmp_path, family
):
    """Oracle: the dense model with the fitted weights and zero rows; generation without cache."""
    model = make_decoder(family)
    keep_heads = 1.0 if family == "gpt2" else 0.5
    settings = CompressConfig(keep=0.5, keep_heads=keep_heads, ridge=1e-3)
    pruning = prune_model(model, tokens_BT, settings)
    assert save_hf(pruning.model, tmp_path / "small")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_same_weights(pruning.model, plain)
    found = logits(plain, tokens_BT)
    torch.testing.assert_close(found, logits(pruning.model, tokens_BT), rtol=0, atol=SINGLE)
    copy = adapter_for(model).working_copy()
    for fit in pruning.fits:
        copy.write(fit.target, fit.weight_IO)
    torch.testing.assert_close(found, logits(copy.model, tokens_BT), rtol=SINGLE, atol=SINGLE)
    assert plain.num_parameters() < model.num_parameters()
    assert torch.equal(generated(plain, cache=True), generated(plain, cache=False))
    assert_same_weights(load_hf(tmp_path / "small"), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_layers_come_back_through_the_manifest(
    transformers, make_decoder, tokens_BT, logits, tmp_path, caplog, family
):
    """Oracle: the model that was saved, bit for bit; generation without cache."""
    small = halved(make_decoder(family), layers=(1,))
    with caplog.at_level(logging.WARNING):
        assert not save_hf(small, tmp_path / "small")
    assert "plain transformers cannot load it" in caplog.text
    assert "load_hf" in caplog.text
    assert "allocation=uniform" in caplog.text
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    state = torch.random.get_rng_state()
    loaded = load_hf(tmp_path / "small")
    assert torch.equal(state, torch.random.get_rng_state())
    assert_same_weights(small, loaded)
    assert torch.equal(logits(loaded, tokens_BT), logits(small, tokens_BT))
    assert loaded.num_parameters() == small.num_parameters()
    assert all(not tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(generated(loaded, cache=True), generated(loaded, cache=False))
    again = halved(loaded)
    assert not save_hf(again, tmp_path / "again")
    assert_same_weights(load_hf(tmp_path / "again"), again)


def test_gpt2_with_fewer_heads_needs_the_manifest(make_decoder, tokens_BT, logits, tmp_path):
    """Oracle: the pruned model; its configuration cannot say how many heads are left."""
    settings = CompressConfig(keep=0.5, keep_heads=0.5, ridge=1e-3)
    small = prune_model(make_decoder("gpt2"), tokens_BT, settings).model
    assert not is_ordinary(small)
    assert not save_hf(small, tmp_path / "small")
    loaded = load_hf(tmp_path / "small")
    assert torch.equal(logits(loaded, tokens_BT), logits(small, tokens_BT))


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_tied_embeddings_stay_tied_and_are_counted_once(make_decoder, tmp_path, family, layers):
    """Oracle: identity of the two parameters; one copy in the file."""
    small = halved(make_decoder(family), layers=layers)
    save_hf(small, tmp_path / "small")
    loaded = load_hf(tmp_path / "small")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    stored = safetensors.torch.load_file(tmp_path / "small" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == loaded.num_parameters()


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_half_precision_round_trip(make_decoder, tokens_BT, logits, tmp_path, layers):
    """Oracle: the saved weights; on request rounded or widened, buffers at full precision."""
    small = halved(make_decoder("llama", dtype=torch.bfloat16), layers=layers)
    save_hf(small, tmp_path / "small")
    loaded = load_hf(tmp_path / "small")
    assert_same_weights(small, loaded)
    assert torch.equal(logits(loaded, tokens_BT), logits(small, tokens_BT))
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    wide = load_hf(tmp_path / "small", dtype=torch.float64)
    assert_same_weights(small.double(), wide)
    assert wide.config.dtype == torch.float64


def test_what_lies_beside_the_weights(make_decoder, tmp_path):
    """Oracle: hashes of the files themselves; the parent's tokenizer; the given decisions."""
    dense = make_decoder("qwen3")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "notes.txt").write_text("mine")
    small = tmp_path / "small"
    save_hf(halved(dense), small, parent=tmp_path / "dense", compression={"keep": 0.5})
    manifest = json.loads((small / MANIFEST).read_text())
    names = {file.name for file in small.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "compression.json"} < names
    assert "notes.txt" not in names
    assert set(manifest["files"]) == names - {MANIFEST}
    for name, sha256 in manifest["files"].items():
        assert files.sha256_file(small / name) == sha256
    assert manifest["layers"] == [{"mlp_width": 12, "heads": 4, "kv_heads": 2}] * 2
    compression = json.loads((small / "compression.json").read_text())
    assert compression == {"parent_fingerprint": manifest["parent"], "keep": 0.5}
    save_hf(dense, small)
    assert not (small / "compression.json").exists()
    assert is_checkpoint(small)


def test_only_checkpoints_are_recognised(tmp_path):
    """Oracle: the key that transformers writes and bundles do not."""
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 1, "kind": "transformer"}')
    assert not is_checkpoint(tmp_path)
    with pytest.raises(BundleError, match="names no model_type"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert is_checkpoint(tmp_path)


def refused(path: str | Path) -> str:
    """Return the one line with which loading fails."""
    with pytest.raises(LipError) as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_foreign_folders_and_names_are_refused(transformers, make_decoder, tmp_path):
    """Oracle: one line with the remedy, no network, no pickle."""
    message = refused("meta-llama/Llama-3.1-8B")
    assert "not fetched" in message
    assert "hf download" in message
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "perpetuum"}')
    assert "perpetuum" in refused(folder)
    transformers.T5Config().save_pretrained(folder)
    assert "T5Config" in refused(folder)
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ConfigError, match="BloomForCausalLM: unknown architecture"):
        load_hf(folder)
    model = make_decoder("llama")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert "safetensors" in refused(tmp_path / "pickled")
    with pytest.raises(ConfigError, match="device=tpu"):
        load_hf(tmp_path / "pickled", device="tpu")


def test_missing_tensors_are_named(make_decoder, tmp_path):
    """Oracle: the tensor that was taken out; nothing is filled with random numbers."""
    make_decoder("qwen3").save_pretrained(tmp_path / "plain")
    save_hf(halved(make_decoder("qwen3"), layers=(1,)), tmp_path / "uneven")
    for folder in (tmp_path / "plain", tmp_path / "uneven"):
        file = folder / "model.safetensors"
        state = safetensors.torch.load_file(file)
        del state["model.norm.weight"]
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})
        if (folder / MANIFEST).exists():
            assert "model.safetensors: content differs" in refused(folder)
            manifest = json.loads((folder / MANIFEST).read_text())
            manifest["files"]["model.safetensors"] = files.sha256_file(file)
            (folder / MANIFEST).write_text(json.dumps(manifest))
        assert "tensor model.norm.weight is missing" in refused(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("format_version", 2, "expected version 1"),
        ("loader", "other", "use the lipllm version"),
        ("layers", [], "0 layers, the configuration has 2"),
        ("layers", [{"mlp_width": 25, "heads": 8, "kv_heads": 4}] * 2, "does not fit"),
        ("layers", [{"mlp_width": 24, "heads": 7, "kv_heads": 4}] * 2, "does not fit"),
        ("layers", [None, None], "does not fit"),
        ("files", {"../config.json": ""}, "missing"),
        ("files", [], "lists no files"),
    ],
    ids=["version", "loader", "count", "width", "heads", "none", "outside", "nothing"],
)
def test_damaged_manifests_are_named(make_decoder, tmp_path, key, value, expected):
    """Oracle: one line about the field that was changed."""
    save_hf(halved(make_decoder("qwen3"), layers=(1,)), tmp_path / "small")
    file = tmp_path / "small" / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    message = refused(tmp_path / "small")
    assert expected in message
    assert "small" in message


def test_a_failed_write_leaves_the_old_checkpoint(make_decoder, tmp_path, monkeypatch):
    """Oracle: every file as before; a user's own folder is never replaced."""
    path = tmp_path / "small"
    save_hf(halved(make_decoder("gpt2")), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(stage: Path, final: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "swap_directory", full)
        with pytest.raises(BundleError, match=r"No space left on device\); what was there"):
            save_hf(make_decoder("gpt2"), path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    (path / MANIFEST).unlink()
    with pytest.raises(BundleError, match="holds something else"):
        save_hf(make_decoder("gpt2"), path)
    with pytest.raises(BundleError, match="cannot read the checkpoint"):
        save_hf(make_decoder("gpt2"), tmp_path / "new", parent=tmp_path / "absent")
