"""What ``prune`` writes down, and the certificate in the new bundle."""

import dataclasses
import json
import math

import pytest

from common.bundle import load_bundle, save_bundle
from common.errors import CertificateError
from common.tokenizer import ByteTokenizer
from compress import record as record_module
from compress.deviation.network import certified_deviation
from compress.record import make_report, prune
from compress.settings import CompressConfig
from solvers.bounds import certify, verify

OLD_KEYS = {
    "format_version",
    "settings",
    "removed_fraction",
    "params_fraction",
    "measured_deviation",
    "semi_empirical_deviation",
    "certified_deviation",
    "top1_agreement",
    "certified_top1",
    "layers",
}
LAYOUT = {"heads": 4, "kv_heads": 2, "content_heads": 2}
SETTINGS = CompressConfig(keep=0.5, keep_heads=0.5, tokens=1)


@pytest.fixture
def dense(make_model, tmp_path):
    """Return a certified bundle whose heads come in groups."""
    model = make_model("gelu", vocab_size=256, **LAYOUT)
    proof = certify(model, tighten=False)
    return save_bundle(tmp_path / "dense", model, ByteTokenizer(), certificate=proof)


def test_the_new_bundle_carries_a_valid_certificate(dense, tokens):
    """Oracle: the independent checker, on the files."""
    pruned, report = prune(dense, SETTINGS, tokens(), max_evals=4)
    assert verify(pruned).tightened == report.after.tightened == pruned.certificate.tightened
    assert pruned.certificate.multipliers
    assert pruned.certificate.tightened < pruned.certificate.naive


def test_norms_alone_are_enough_when_asked(dense, tokens):
    """No multipliers in the bundle; still a proof, and bounds that hold."""
    pruned, report = prune(dense, SETTINGS, tokens(), max_evals=0, tighten=False)
    assert not pruned.certificate.multipliers
    assert verify(pruned).tightened == pruned.certificate.naive
    assert 0 < report.measured_deviation <= report.semi_empirical_deviation
    assert report.semi_empirical_deviation <= report.certified_deviation


def test_the_record_holds_everything(dense, tokens):
    """Plain JSON with the keys of earlier versions, per place and in total."""
    pruned, _ = prune(dense, SETTINGS, tokens(), max_evals=0)
    record = load_bundle(pruned.path).compression
    assert set(record) >= OLD_KEYS
    assert record["parent_fingerprint"] == dense.fingerprint
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    worst, text = record["deviation"]["worst_case"], record["deviation"]["text"]
    assert worst["bound"] == min(worst["form_a"], worst["form_b"]) == record["certified_deviation"]
    for row in ("actual", "form_a", "form_b", "bound"):
        assert text[row]["median"] <= text[row]["q90"] <= text[row]["max"]
    for label in ("median", "q90", "max"):
        assert text["actual"][label] <= text["bound"][label] <= text["form_b"][label]
    assert text["positions"] == tokens().numel()
    assert text["actual"]["max"] == record["measured_deviation"]
    assert text["bound"]["max"] == record["semi_empirical_deviation"]
    assert record["certified_top1"] == worst["top1"] <= text["top1"] <= text["top1_measured"]
    before, after = record["certificate"]["before"], record["certificate"]["after"]
    assert before["naive"] == dense.certificate.naive
    assert after["tightened"] == pruned.certificate.tightened
    assert [place["name"] for place in record["layers"]] == [
        "layers.0.heads",
        "layers.0.mlp",
        "layers.1.heads",
        "layers.1.mlp",
    ]
    for place in record["layers"]:
        assert len(place["kept"]) == place["width"] == place["kept_components"] * place["unit"]
        assert place["rms_delta"] <= place["measured_delta"] <= place["certified_delta"]
        assert 0 < place["error"] < 1


def test_sizes_are_those_of_the_models(make_model, tokens, tmp_path):
    """Oracle: parameters counted in the models; what the places lose is what the model loses."""
    model = make_model("relu", vocab_size=256, heads=4, kv_heads=2)
    proof = certify(model, tighten=False)
    bundle = save_bundle(tmp_path / "plain", model, ByteTokenizer(), certificate=proof)
    pruned, report = prune(bundle, SETTINGS, tokens(), max_evals=0)
    for size in report.to_dict()["size"].values():
        lost = [part["before"] - part["after"] for part in (size["pruned_places"], size["model"])]
        assert 0 < lost[0] == pytest.approx(lost[1], rel=1e-12)
    params = report.to_dict()["size"]["params"]["model"]
    assert params["before"] == sum(p.numel() for p in model.parameters())
    assert params["after"] == sum(p.numel() for p in pruned.model.parameters())
    assert report.params_fraction == params["after"] / params["before"]


def test_the_same_call_writes_the_same_record(dense, tokens, tmp_path):
    """No clock and no chance in what is written down."""
    texts = []
    for name in ("one", "two"):
        pruned, _ = prune(dense, SETTINGS, tokens(), path=tmp_path / name, max_evals=2)
        texts.append(json.dumps(pruned.compression, sort_keys=True))
    assert texts[0] == texts[1]


def test_keeping_everything_costs_nothing(dense, tokens):
    """All deviations exactly 0, every confident position proved, the certificate not larger."""
    pruned, report = prune(dense, CompressConfig(keep=1.0, tokens=1), tokens(), max_evals=0)
    assert report.measured_deviation == report.semi_empirical_deviation == 0.0
    assert report.certified_deviation == report.expected_est == 0.0
    assert report.certified_top1 == report.text_top1 == report.top1_agreement == 1.0
    assert pruned.certificate.tightened <= dense.certificate.tightened
    assert report.params_fraction == 1.0


def test_a_model_from_which_nothing_went_keeps_its_certificate(make_model, tokens, tmp_path):
    """The proof of the same weights, not a new and shorter search."""
    model = make_model("maxmin", vocab_size=256, **LAYOUT)
    proof = certify(model)
    dense = save_bundle(tmp_path / "proved", model, ByteTokenizer(), certificate=proof)
    same, report = prune(dense, dataclasses.replace(SETTINGS, keep=1.0, keep_heads=1.0), tokens())
    assert same.certificate.tightened == report.after.tightened == proof.tightened
    assert verify(same).tightened <= proof.tightened


def test_infinite_settings_are_written_as_text(dense, tokens):
    """JSON knows no infinity."""
    settings = CompressConfig(keep=0.5, tau=math.inf, tokens=1)
    pruned, _ = prune(dense, settings, tokens(), max_evals=0)
    assert pruned.compression["settings"]["tau"] == "inf"


def test_a_bundle_without_certificate_is_refused_with_a_remedy(dense, tokens, tmp_path):
    """Nothing about a change can be proved without constants."""
    bare = save_bundle(tmp_path / "bare", dense.model, dense.tokenizer)
    with pytest.raises(CertificateError, match="run: lipllm certify bundle="):
        prune(bare, SETTINGS, tokens())


def test_a_refuted_certificate_is_reported(pruned_pair, tokens):
    """A dense proof with constants that are too small does not survive the text."""
    dense, certificate, pruning = pruned_pair("relu", "none", keep=0.3)
    wrong = dataclasses.replace(certificate, head_norm=certificate.head_norm / 1e4)
    with pytest.raises(CertificateError, match="refuted"):
        make_report(dense, wrong, pruning, tokens(), SETTINGS, max_evals=0)


def test_a_change_above_its_bound_is_reported(pruned_pair, tokens, monkeypatch):
    """Certified changes of blocks that are far too small are named."""
    dense, certificate, pruning = pruned_pair("relu", "none", keep=0.3)

    def too_small(*args, **options):
        found = certified_deviation(*args, **options)
        small = dataclasses.replace(found.b, deltas=tuple(d / 1e4 for d in found.b.deltas))
        return dataclasses.replace(found, b=small)

    monkeypatch.setattr(record_module, "certified_deviation", too_small)
    with pytest.raises(CertificateError, match=r"change of block 1 above .* refuted"):
        make_report(dense, certificate, pruning, tokens(), SETTINGS, max_evals=0)
