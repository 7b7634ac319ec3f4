"""Calibration of models of ``transformers`` against hooks on their own projections and norms."""

import itertools
import json

import pytest
import torch
from omegaconf import OmegaConf

from common import files
from common.bundle_format import KV_STATS
from common.config import build
from common.errors import BundleError, DataError
from common.runs import Run
from common.tracking import is_declared
from serve.calibrate_app import calibrate as command
from serve.hugging_face import HuggingFaceDecoder, load_checkpoint
from serve.kv.calibrate import calibrate, layer_stats, merge
from serve.texts import served_text

EXACT = 1e-12  # float64 means of a few hundred terms of size one, batched differently
FACTOR = 1e-8  # the factor of YaRN is rounded to float32 in the model's tables
SINGLE = 1e-5  # relative; float32 and bfloat16 attention before the layer differs in its rounding

# What enters the rotation: the module of the attention block, and how its output is cut.
SOURCES = {
    "llama": ("q_proj", "k_proj"),
    "yarn": ("q_proj", "k_proj"),
    "mistral": ("q_proj", "k_proj"),
    "qwen2": ("q_proj", "k_proj"),
    "glm": ("q_proj", "k_proj"),
    "smollm3": ("q_proj", "k_proj"),
    "qwen3": ("q_norm", "k_norm"),
}


def hooked(model, name, tokens, skip):
    """Run the stock model; return queries and keys (M, heads, D) of each layer before RoPE."""
    found = {"q": [], "k": []}

    def collecting(kind):
        def hook(module, arguments, output):
            rows = output.unflatten(-1, (-1, width)) if output.ndim == 3 else output
            found[kind].append(rows[:, skip:].flatten(0, 1).double())

        return hook

    handles = []
    for layer in model.model.layers:
        width = layer.self_attn.head_dim
        for kind, source in zip("qk", SOURCES[name], strict=True):
            module = getattr(layer.self_attn, source)
            handles.append(module.register_forward_hook(collecting(kind)))
    model(tokens)
    for handle in handles:
        handle.remove()
    return found


def as_bands(x, spec):
    """Complex bands (M, heads, F) and the components that are not rotated."""
    cut = 2 * spec.bands
    if spec.interleaved:
        return torch.complex(x[..., 0:cut:2], x[..., 1:cut:2]), x[..., cut:]
    return torch.complex(x[..., : spec.bands], x[..., spec.bands : cut]), x[..., cut:]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_statistics_equal_those_of_hooks_in_float64(hf, name):
    """Oracle: hooks on the projections (or the norms after them) of the stock model."""
    model = hf.make_model(name, torch.float64)
    tokens = torch.tensor(hf.make_prompts([40, 40, 40], seed=2))
    found = hooked(model, name, tokens, skip=3)
    decoder = HuggingFaceDecoder(model)
    stats = calibrate(decoder, tokens.split(2), skip=3)
    assert int(stats["tokens"]) == 3 * 37
    split = layer_stats(stats, decoder)
    for spec, own, queries, keys in zip(decoder.layers, split, *found.values(), strict=True):
        q_bands, q_rest = as_bands(queries, spec)
        k_bands, k_rest = as_bands(keys, spec)
        expected = {
            "q_mean": torch.view_as_real(q_bands.mean(0)),
            "q_abs": q_bands.abs().mean(0),
            "q_sq": q_bands.abs().square().mean(0),
            "k_mean": torch.view_as_real(k_bands.mean(0)),
            "k_abs": k_bands.abs().mean(0),
            "inv_freq": spec.inverse_frequency,
        }
        if q_rest.shape[-1]:
            expected |= {
                "rest_mean": q_rest.mean(0),
                "rest_abs": q_rest.abs().mean(0),
                "rest_sq": q_rest.square().mean(0),
                "k_rest_mean": k_rest.mean(0),
                "k_rest_abs": k_rest.abs().mean(0),
            }
        assert own.keys() == expected.keys()
        # The stock model's own tables are float32, ours float64: layers after the first differ.
        for key, value in expected.items():
            assert own[key].shape == value.shape
            assert torch.allclose(own[key], value, rtol=0, atol=SINGLE), key
    first = as_bands(found["q"][0], decoder.layers[0])[0].abs().mean(0)
    assert float((split[0]["q_abs"] - first).abs().max()) < FACTOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centres_survive_small_dtypes(hf, dtype):
    """Oracle: hooks on the first layer in the same dtype: queries are read, not un-rotated."""
    model = hf.make_model("qwen3", dtype)
    tokens = torch.tensor(hf.make_prompts([60, 60], seed=2))
    queries = hooked(model, "qwen3", tokens, skip=0)["q"][0]
    decoder = HuggingFaceDecoder(model)
    bands, _ = as_bands(queries, decoder.layers[0])
    found = calibrate(decoder, [tokens])["layers.0.q_mean"]
    error = (torch.view_as_complex(found) - bands.mean(0)).abs()
    assert float(error.max() / bands.abs().mean()) < SINGLE


def test_merged_halves_equal_the_whole(hf):
    """Oracle: one pass over all batches, unrotated components included."""
    decoder = HuggingFaceDecoder(hf.make_model("glm", torch.float64))
    batches = torch.tensor(hf.make_prompts([20] * 5, seed=2)).split(1)
    whole = calibrate(decoder, batches)
    parts = merge(calibrate(decoder, batches[:2]), calibrate(decoder, batches[2:]))
    assert whole.keys() == parts.keys()
    assert all(float((whole[key] - parts[key]).abs().max()) < EXACT for key in whole)


def test_statistics_of_another_rotation_are_refused(hf):
    """Oracle: the error contract: frequencies of llama3 scaling are not those of plain RoPE."""
    plain = HuggingFaceDecoder(hf.make_model("llama"))
    scaled = HuggingFaceDecoder(hf.make_model("llama3"))
    stats = calibrate(plain, [torch.arange(20).view(1, 20)])
    with pytest.raises(BundleError, match="RoPE frequencies"):
        layer_stats(stats, scaled)


def run_command(folder, directory, text_file, **settings):
    """Run ``lipllm calibrate`` on a folder."""
    data = {"_target_": "common.corpus.DataConfig", "source": "local", "path": str(text_file)}
    calibrating = {"_target_": "serve.kv.calibrate.CalibrateConfig", "tokens": 400, "length": 40}
    cfg = {"bundle": str(folder), "data": data, "calibrate": calibrating | settings}
    cfg["device"] = "cpu"
    directory.mkdir()
    run = Run(command="lipllm calibrate", directory=directory, config=cfg, config_hash="")
    return command(OmegaConf.create(cfg), run)


def test_command_writes_the_statistics_beside_the_weights(hf, folder, tmp_path, text_file):
    """Oracle: the library call on the same windows; the report's file has every layer."""
    outcome = run_command(folder, tmp_path / "run", text_file)
    assert all(is_declared(name) for name in outcome.metrics)
    assert outcome.artifacts["kv_stats"] == folder / KV_STATS
    checkpoint = load_checkpoint(folder)
    stats = checkpoint.kv_stats
    assert outcome.metrics["serve/calibration_tokens"] == int(stats["tokens"]) == 10 * 36
    config = OmegaConf.create(
        {"_target_": "common.corpus.DataConfig", "source": "local", "path": str(text_file)}
    )
    windows = served_text(build(config), checkpoint).windows("train", 40, 10)[:, :-1]
    expected = calibrate(checkpoint.model, [windows], skip=4)
    assert expected.keys() == stats.keys()
    assert all(float((expected[k] - stats[k]).abs().max()) < SINGLE for k in stats)
    content = json.loads(outcome.artifacts["concentration"].read_text())
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2]
    assert [len(layer["dominant"]) for layer in content["layers"]] == [4, 4, 4]
    assert len(content["bands"]) == 8


def test_command_falls_back_to_the_run_directory(hf, folder, tmp_path, text_file, monkeypatch):
    """Oracle: statistics that a read-only folder cannot take still serve, by their file."""

    def refuse(path, data):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        path.write_bytes(data)

    monkeypatch.setattr(files, "replace_bytes", refuse)
    outcome = run_command(folder, tmp_path / "run", text_file)
    place = outcome.artifacts["kv_stats"]
    assert place == tmp_path / "run" / KV_STATS
    assert load_checkpoint(folder).kv_stats is None
    assert layer_stats(load_checkpoint(folder, stats=place).kv_stats, load_checkpoint(folder).model)


def test_windows_of_text_begin_with_the_prefix_and_are_disjoint(hf, folder, text_file):
    """Oracle: the tokenizer on the whole text, which gives one token per byte."""
    checkpoint = load_checkpoint(folder)
    config = OmegaConf.create(
        {"_target_": "common.corpus.DataConfig", "source": "local", "path": str(text_file)}
    )
    text = served_text(build(config), checkpoint)
    whole = checkpoint.tokenizer.encode_plain(bytes(text.corpus.tokens("val")).decode())
    every = text.windows("val", 49)
    assert every.shape == (len(whole) // 50, 50)
    assert every.flatten().tolist() == whole[: every.numel()].tolist()
    few = text.windows("val", 49, 5)
    assert few.shape == (5, 50)
    starts = [next(i for i in range(len(whole)) if whole[i : i + 50].tolist() == row)
              for row in few.tolist()]  # fmt: skip
    assert all(b - a >= 50 for a, b in itertools.pairwise(starts))
    with pytest.raises(DataError, match="shorter windows"):
        text.windows("val", 10**6, 1)
