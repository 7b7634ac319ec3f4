"""The frontier of a compress run: one record per budget, made of measured and proved figures."""

import pytest
import torch

from common.bundle import save_bundle
from common.models import LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from compress.adapters import adapter_for
from compress.flops import token_flops
from compress.frontier import frontier_point, frontier_points, speeds
from compress.measure import Reference
from compress.pruner import prune_model, survey
from compress.record import prune
from compress.settings import CompressConfig
from solvers.bounds import certify

KEEPS = (0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def frontier(tmp_path_factory):
    """Return the dense model, its texts, the main report and the frontier's records."""
    tmp_path = tmp_path_factory.mktemp("frontier")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=256, width=12, layers=2, heads=2, context=16, mlp_width=24, activation="relu"
        )
        model = LipschitzTransformer(config).eval()
    proof = certify(model, tighten=False)
    dense = save_bundle(tmp_path / "dense", model, ByteTokenizer(), certificate=proof)
    generator = torch.Generator().manual_seed(0)
    windows_BT = torch.randint(256, (20, 17), generator=generator)
    texts = windows_BT[:12, :-1], windows_BT[12:]
    settings = CompressConfig(keep=0.5, frontier=KEEPS)
    found = survey(adapter_for(dense.model), texts[0], settings, keeps=KEEPS)
    _, report = prune(dense, settings, texts[0], path=tmp_path / "pruned", found=found)
    reference = Reference(dense.model, texts[1], 1.0)
    points = frontier_points(dense.model, proof, found, texts, reference, report)
    return dense.model, texts, report, points


def test_one_record_per_further_budget(frontier):
    """Oracle: the settings; the main run's own budget is missing, order is one-shot."""
    _, _, _, points = frontier
    assert [point["keep"] for point in points] == [0.75, 0.25]
    assert {point["order"] for point in points} == {"one_shot"}
    assert {point["keep_heads"] for point in points} == {1.0}
    for name in ("removed_fraction", "neurons_removed"):
        assert points[0][name] < points[1][name]
    assert points[0]["flops_fraction"] > points[1]["flops_fraction"]


def test_records_against_the_parts(frontier):
    """Oracle: the model pruned again by itself, measured and certified by itself."""
    dense, texts, _, points = frontier
    for point in points:
        settings = CompressConfig(keep=point["keep"], order="one_shot")
        model = prune_model(dense, texts[0], settings).model
        quality = Reference(dense, texts[1], 1.0).quality(model)
        assert point["val_bits_per_byte"] == pytest.approx(quality.bits_per_byte, rel=1e-6)
        assert point["kl_nats"] == pytest.approx(quality.kl_nats, rel=1e-5)
        assert point["cert_naive"] == pytest.approx(certify(model, tighten=False).naive)
        assert point["cert_tightened"] <= point["cert_naive"]
        assert point["cert_tightened"] <= point["cert_tightened_before"] * (1 + 1e-6)
        assert point["params_fraction"] == model.num_parameters / dense.num_parameters
        ratio = token_flops(model.config) / token_flops(dense.config)
        assert point["flops_fraction"] == ratio
        assert 0 < point["measured_deviation"] <= point["certified_deviation"]
        assert min(point["forward_speedup"], point["decode_speedup"]) > 0


def test_the_main_run_gives_the_same_columns(frontier):
    """Oracle: the names of the other records; the times are those handed over."""
    dense, texts, report, points = frontier
    quality = Reference(dense, texts[1], 1.0).quality(report.pruning.model)
    times = {"forward_speedup": 1.5, "decode_speedup": 1.25}
    point = frontier_point(report, quality, times)
    assert set(point) == set(points[0])
    assert (point["keep"], point["order"], point["forward_speedup"]) == (0.5, "sequential", 1.5)
    assert point["heads_removed"] == 0
    assert set(speeds(dense, report.pruning.model, 1)) == set(times)
