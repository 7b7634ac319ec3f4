"""Statistics of the published code: synthetic files, refusals, and the shared real ones."""

import os
from pathlib import Path

import pytest
import torch

from common.errors import BundleError
from common.models import LipschitzTransformer, ModelConfig
from common.models.rope import inverse_frequencies
from serve.decoder import Decoder, LayerSpec
from serve.kv.calibrate import centre_cosine, layer_stats
from serve.kv.concentration import ratios, resultant_lengths
from serve.kv.reference_stats import import_reference

SHARED = os.environ.get("LIPLLM_SHARED_DATA")
LAYERS, HEADS, BANDS = 2, 3, 4
FREQUENCY = inverse_frequencies(2 * BANDS, 1e4)


class Shape(Decoder):
    """A decoder of which only the layers matter."""

    def __init__(self, layers):
        self.layers = tuple(layers)

    def forward(self, tokens_N, positions_N, attend, last_M=None):
        """Run nothing."""
        raise NotImplementedError

    @property
    def fingerprint(self):
        """Nothing to identify."""
        return ""

    @property
    def model(self):
        """There is none."""
        raise NotImplementedError


def spec(heads=HEADS, bands=BANDS, frequency=FREQUENCY, **changes):
    """One layer."""
    fields = {"heads": heads, "kv_heads": 1, "head_dim": 2 * bands, "content_heads": heads}
    fields |= {"scale": 1.0, "inverse_frequency": frequency}
    return LayerSpec(**(fields | changes))


def content(layers=LAYERS, heads=HEADS, bands=BANDS, **metadata):
    """What the published script stores, with random centres within the mean moduli."""
    generator = torch.Generator().manual_seed(0)
    stats = {}
    for layer in range(layers):
        for head in range(heads):
            real, imag, extra = torch.rand(3, bands, generator=generator)
            size = torch.hypot(real, imag) + extra
            vectors = {"q_mean_real": real, "q_mean_imag": imag, "q_abs_mean": size}
            stats[f"layer{layer:02d}_head{head:02d}"] = vectors
    sampled = [[layer, head] for layer in range(layers) for head in range(heads)]
    known = {"rope_style": "half", "head_dim": 2 * bands, "sampled_heads": sampled}
    return {"metadata": known | metadata, "stats": stats}


def saved(tmp_path, value):
    """A file with that content."""
    torch.save(value, tmp_path / "stats.pt")
    return tmp_path / "stats.pt"


def test_vectors_arrive_at_their_heads(tmp_path):
    """Oracle: the vectors that were stored; frequencies are the model's, to the bit."""
    file = content(rope_theta=10000, rope_type="default")
    model = Shape([spec()] * LAYERS)
    stats = import_reference(saved(tmp_path, file), model)
    for layer in range(LAYERS):
        for head in range(HEADS):
            vectors = file["stats"][f"layer{layer:02d}_head{head:02d}"]
            mean = stats[f"layers.{layer}.q_mean"][head]
            assert torch.equal(mean[:, 0].float(), vectors["q_mean_real"])
            assert torch.equal(mean[:, 1].float(), vectors["q_mean_imag"])
            assert torch.equal(stats[f"layers.{layer}.q_abs"][head].float(), vectors["q_abs_mean"])
        assert torch.equal(stats[f"layers.{layer}.inv_freq"], FREQUENCY)
    assert all(entry is not None for entry in layer_stats(stats, model))


def test_windowed_layers_may_be_missing_and_ours_can_be_imported(tmp_path):
    """Oracle: the rule that only full attention needs statistics; a model of ours."""
    file = content()
    for head in range(HEADS):
        del file["stats"][f"layer00_head{head:02d}"]
    windowed = Shape([spec(sliding_window=8), spec()])
    stats = import_reference(saved(tmp_path, file), windowed)
    assert [entry is None for entry in layer_stats(stats, windowed)] == [True, False]
    config = ModelConfig(vocab_size=5, width=8, layers=2, heads=HEADS, head_dim=8, context=16)
    ours = LipschitzTransformer(config)
    theta = import_reference(saved(tmp_path, content()), ours)
    assert all(entry is not None for entry in layer_stats(theta, ours))


def without(name):
    """The content without one head."""
    file = content()
    del file["stats"][name]
    return file


def changed(vector, value):
    """The content with one vector replaced."""
    file = content()
    file["stats"]["layer01_head02"][vector] = value
    return file


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (without("layer01_head01"), {}, "lacks head 1 of layer 1"),
        (content(heads=2), {}, "lacks head 2 of layer 0"),
        (content(heads=4), {}, "head 3 of 3"),
        (content(layers=3), {}, "3 layers, the model has 2"),
        (content(rope_style="interleaved"), {}, "pairs components 'half'"),
        (content(), {"interleaved": True}, "pairs components 'interleaved'"),
        (content(bands=5), {}, "head_dim 10, the model has 8"),
        (content(), {"head_dim": 10}, "head_dim 8, the model has 10"),
        (content(head_dim=10), {"head_dim": 10}, "unrotated"),
        (content(rope_theta=5e5), {}, "rope_theta 500000.0"),
        (changed("q_abs_mean", torch.ones(3)), {}, r"shape \(3,\), expected \(4,\)"),
        (changed("q_abs_mean", torch.zeros(4)), {}, "longer than their mean length"),
        (changed("q_mean_real", torch.full((4,), torch.nan)), {}, "not finite"),
        ({"stats": {}}, {}, "expected 'metadata'"),
        ({"metadata": {}, "stats": {"head": {}}}, {}, "expected 'metadata'"),
        (torch.nn.Linear(1, 1), {}, "no torch archive of plain values"),
    ],
    ids=range(16),
)
def test_other_files_are_refused(tmp_path, file, changes, reason):
    """Oracle: the error contract; missing heads and foreign rotations are never filled in."""
    model = Shape([spec(**changes)] * LAYERS)
    with pytest.raises(BundleError, match=reason) as info:
        import_reference(saved(tmp_path, file), model)
    assert "calibrate.reference=" in str(info.value)


def test_missing_file_is_named(tmp_path):
    """Oracle: the error contract."""
    with pytest.raises(BundleError, match="No such file"):
        import_reference(tmp_path / "absent.pt", Shape([spec()]))


def shared(name, shape):
    """A shared file, imported for a model of its shape."""
    layers, heads, bands = shape
    model = Shape([spec(heads, bands, inverse_frequencies(2 * bands, 1e6))] * layers)
    return import_reference(Path(str(SHARED)) / "triattention_stats" / f"{name}.pt", model)


@pytest.mark.skipif(not SHARED, reason="LIPLLM_SHARED_DATA names no folder of real statistics")
def test_two_texts_give_one_model_the_same_centres():
    """Oracle: the cosine measured between these two files by other code, 0.994."""
    first, second = (shared(f"ds_qwen7b_{text}", (28, 28, 64)) for text in ("aime24", "aime25"))
    assert centre_cosine(first, second) == pytest.approx(0.994, abs=0.001)


@pytest.mark.skipif(not SHARED, reason="LIPLLM_SHARED_DATA names no folder of real statistics")
@pytest.mark.parametrize(
    ("name", "shape", "mean", "dominant"),
    [
        ("qwen3_8b_aime24", (36, 32, 64), 0.64, 0.993),
        ("ds_qwen7b_aime24", (28, 28, 64), 0.53, 0.995),
        ("gpt_oss_120b", (36, 64, 32), 0.75, 0.956),
    ],
)
def test_shared_files_have_the_published_concentration(name, shape, mean, dominant):
    """Oracle: shapes and mean resultant lengths measured on these files by other code."""
    stats = shared(name, shape)
    lengths = resultant_lengths(stats)
    assert lengths["mean"] == pytest.approx(mean, abs=0.006)
    assert lengths["dominant"] == pytest.approx(dominant, abs=0.001)
    every = torch.cat([ratio.flatten() for ratio, _ in ratios(stats).values()])
    assert float(every.max()) <= 1 + 1e-6
