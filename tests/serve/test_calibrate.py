"""Calibration statistics against per-token loops, their merging, checking and stability."""

import pytest
import torch
from omegaconf import OmegaConf

from common.bundle import load_bundle, save_bundle
from common.config import build
from common.corpus import prepare_corpus
from common.errors import BundleError, ConfigError, DataError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.runs import Run
from common.tokenizer import ByteTokenizer
from common.tracking import is_declared
from serve.calibrate_app import calibrate as command
from serve.kv.calibrate import (
    CalibrateConfig,
    calibrate,
    centre_cosine,
    layer_stats,
    merge,
)
from serve.kv.concentration import resultant_lengths

EXACT = 1e-12  # float64 means of a few hundred terms of size one
SINGLE = 1e-6  # float32 activations of size one, batched differently
STABLE_COSINE = 0.99  # what published models reach between two texts


def make_model(**changes):
    """A small float64 model whose second layer has positional heads only."""
    torch.manual_seed(1)
    fields = {"vocab_size": 11, "width": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 6}
    fields |= {"context": 24, "content_heads": (4, 0, 2), "activation": "maxmin"}
    model = LipschitzTransformer(ModelConfig(**(fields | changes))).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def token_batches(count, *, length=20, seed=0):
    """Batches with a skewed unigram distribution, so that mean queries are not zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.5 ** torch.arange(11)
    shape = (4, length)
    draw = [torch.multinomial(weights, 4 * length, True, generator=generator) for _ in range(count)]
    return [tokens.view(shape) for tokens in draw]


def test_statistics_equal_a_loop_over_tokens():
    """Oracle: the projections of the model's own stream, one token and band at a time."""
    model, batches = make_model(), token_batches(2)
    stats = calibrate(model, batches, skip=3)
    assert int(stats["tokens"]) == 2 * 4 * 17
    assert not any(key.startswith("layers.1.") for key in stats)
    for index, heads in ((0, 4), (2, 2)):
        queries, keys = [], []
        for tokens in batches:
            x = model.embed(tokens)
            for layer in model.layers[:index]:
                x = layer(x)
            weight_q = model.layers[index].attention.query.weight
            weight_k = model.layers[index].attention.key.weight
            queries.append((x @ weight_q.T)[:, 3:].reshape(-1, heads, 6))
            keys.append((x @ weight_k.T)[:, 3:].reshape(-1, heads // 2, 6))
        for name, rows in (("q", torch.cat(queries)), ("k", torch.cat(keys))):
            complex_NHF = torch.complex(rows[..., :3], rows[..., 3:])
            mean, size = complex_NHF.mean(0), complex_NHF.abs()
            got = torch.view_as_complex(stats[f"layers.{index}.{name}_mean"])
            assert float((got - mean).abs().max()) < EXACT
            assert float((stats[f"layers.{index}.{name}_abs"] - size.mean(0)).abs().max()) < EXACT
        square = torch.cat(queries).view(-1, heads, 2, 3).square().sum(2).mean(0)
        assert float((stats[f"layers.{index}.q_sq"] - square).abs().max()) < EXACT


def test_merged_halves_equal_the_whole():
    """Oracle: one pass over all batches; the halves have different sizes."""
    model, batches = make_model(), token_batches(5)
    whole = calibrate(model, batches)
    parts = merge(calibrate(model, batches[:2]), calibrate(model, batches[2:]))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert float((value - parts[key]).abs().max()) < EXACT


def test_two_disjoint_halves_agree():
    """Property: query centres belong to the model, not to the text they were measured on."""
    model = make_model()
    first = calibrate(model, token_batches(20, seed=1))
    second = calibrate(model, token_batches(20, seed=2))
    assert centre_cosine(first, second) > STABLE_COSINE
    assert centre_cosine(first, {key: -value for key, value in second.items()}) < -STABLE_COSINE


def test_resultant_length_of_one_direction_is_one():
    """Oracle: constant tokens have constant queries in the first layer."""
    model = make_model(layers=1, content_heads=4)
    stats = calibrate(model, [torch.zeros(2, 5, dtype=torch.long)])
    lengths = resultant_lengths(stats)
    assert abs(lengths["mean"] - 1) < EXACT
    assert abs(lengths["dominant"] - 1) < EXACT
    mixed = resultant_lengths(calibrate(model, token_batches(4)))
    assert 0 < mixed["mean"] < 1


def test_layer_stats_accepts_its_own_model_and_refuses_others():
    """Oracle: the error contract; wrong RoPE frequencies would otherwise go unnoticed."""
    model = make_model()
    stats = calibrate(model, token_batches(1))
    split = layer_stats(stats, model)
    assert [entry is None for entry in split] == [False, True, False]
    assert set(split[0]) == {"q_mean", "q_abs", "q_sq", "k_mean", "k_abs", "inv_freq"}
    with pytest.raises(BundleError, match="lipllm calibrate"):
        layer_stats(None, model)
    with pytest.raises(BundleError, match="RoPE frequencies"):
        layer_stats(stats, make_model(rope_theta=500.0))
    with pytest.raises(BundleError, match=r"layers\.2\.q_mean: expected shape \(4, 3, 2\)"):
        layer_stats(stats, make_model(content_heads=(4, 0, 4)))
    with pytest.raises(BundleError, match=r"layers\.1\.q_mean"):
        layer_stats(stats, make_model(content_heads=(4, 4, 2)))
    with pytest.raises(BundleError, match="different models"):
        merge(stats, {"tokens": torch.tensor(1)})


def test_positional_models_need_no_statistics():
    """Oracle: no content heads, nothing to average, nothing to ask for."""
    model = make_model(content_heads=(0, 0, 0))
    stats = calibrate(model, token_batches(1))
    assert set(stats) == {"tokens"}
    assert layer_stats(None, model) == [None, None, None]
    assert resultant_lengths(stats) == {"mean": 0.0, "dominant": 0.0}
    assert centre_cosine(stats, stats) == 1.0


def test_bad_settings_and_empty_text_are_refused():
    """Oracle: the error contract."""
    with pytest.raises(ConfigError, match=r"calibrate\.tokens=0"):
        CalibrateConfig(tokens=0)
    with pytest.raises(ConfigError, match="split"):
        CalibrateConfig(split="test")
    with pytest.raises(DataError, match=r"lower calibrate\.skip"):
        calibrate(make_model(), token_batches(1), skip=20)


def test_command_extends_the_bundle_and_returns_declared_metrics(tmp_path, text_file):
    """Oracle: the library call on the same windows; the bundle keeps weights and fingerprint."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=256, width=16, layers=2, heads=2, context=32)
    model = LipschitzTransformer(config)
    before = save_bundle(tmp_path / "bundle", model, ByteTokenizer())
    data = {"_target_": "common.corpus.DataConfig", "source": "local", "path": str(text_file)}
    settings = {"_target_": "serve.kv.calibrate.CalibrateConfig", "tokens": 640, "batch": 8}
    cfg = {"bundle": str(tmp_path), "data": data, "calibrate": settings, "device": "cpu"}
    run = Run(command="calibrate", directory=tmp_path, config=cfg, config_hash="")
    outcome = command(OmegaConf.create(cfg), run)
    assert all(is_declared(name) for name in outcome.metrics)
    assert outcome.metrics["serve/calibration_tokens"] == 20 * (32 - 4)
    assert 0 < outcome.metrics["serve/concentration"] < 1
    after = load_bundle(outcome.artifacts["bundle"])
    assert after.fingerprint == before.fingerprint
    assert [entry is None for entry in layer_stats(after.kv_stats, after.model)] == [False, False]
    corpus = prepare_corpus(build(data), after.tokenizer)
    expected = calibrate(after.model, [corpus.windows("train", 32, 20)[:, :-1]], skip=4)
    for key, value in expected.items():
        assert float((value - after.kv_stats[key]).abs().max()) < SINGLE


def test_command_refuses_a_classifier(tmp_path):
    """Oracle: the error contract."""
    save_bundle(tmp_path / "bundle", LipschitzMLP((4, 3)))
    settings = {"_target_": "serve.kv.calibrate.CalibrateConfig"}
    cfg = OmegaConf.create({"bundle": str(tmp_path), "calibrate": settings, "device": "auto"})
    run = Run(command="calibrate", directory=tmp_path, config={}, config_hash="")
    with pytest.raises(BundleError, match="no KV cache"):
        command(cfg, run)
