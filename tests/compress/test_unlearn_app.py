"""The unlearn command on a tiny transformer and a digit classifier."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.bundle import Bundle, load_bundle, save_bundle
from common.images import load_digits
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from compress.unlearning import standing
from solvers.bounds import certify, verify

FEW = ["unlearn.relearn_steps=2", "unlearn.tokens=2048", "unlearn.eval_tokens=512"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Return a folder with a class of numbers and a class of words, half of them each."""
    root = tmp_path_factory.mktemp("texts")
    for index in range(24):
        numbers = "".join(f"{i * i} {i}\n" for i in range(index, index + 120))
        words = "".join(f"the line is {'abc'[i % 3]} again\n" for i in range(60))
        for name, text in (("numbers", numbers), ("words", words)):
            path = root / name / f"{index}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{name} {index}\n{text}")
    return root


@pytest.fixture(scope="module")
def language(tmp_path_factory, texts) -> Bundle:
    """Return a certified byte model that has seen both classes for a moment."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(vocab_size=256, width=16, layers=2, heads=2, context=32)
        model = LipschitzTransformer(config)
        data = b"".join(path.read_bytes() for path in sorted(texts.rglob("*.txt")))
        windows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().unfold(0, 33, 32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for step in range(30):
            batch = windows[step::30][:32]
            optimizer.zero_grad()
            logits = model(batch[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("language") / "bundle"
    return save_bundle(path, model, ByteTokenizer(), certificate=certify(model, tighten=False))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Bundle:
    """Return a certified classifier of digits."""
    digits = load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LipschitzMLP((64, 32, 32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train_NI), digits.train_labels_N).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("classifier") / "bundle"
    return save_bundle(path, model, certificate=certify(model, tighten=False))


def test_text_class_is_forgotten_under_its_certificate(lipllm, language, texts):
    """Oracle: figures before and after, the checker on the new bundle, the parent's untouched."""
    done = lipllm(
        *("unlearn", f"bundle={language.path}", "data=local", f"data.path={texts}"),
        *("unlearn.forget=numbers", "unlearn.layers=1", "unlearn.mu=1", *FEW),
    )
    assert done.status == 0, done.err
    found = {name.removeprefix("unlearn/"): value for name, value in done.metrics.items()}
    forgotten = found["forget_bits_per_byte_held_after"] - found["forget_bits_per_byte_held_before"]
    lost = found["retain_bits_per_byte_held_after"] - found["retain_bits_per_byte_held_before"]
    assert forgotten > max(0.05, 2 * lost)
    bundle = load_bundle(done.directory / "bundle")
    assert bundle.manifest["parent"] == language.fingerprint
    assert verify(bundle.model, bundle.certificate).naive == bundle.certificate.naive
    assert bundle.certificate.weights_sha256 != language.certificate.weights_sha256
    assert found["naive_after"] == bundle.certificate.naive
    assert found["naive_after"] <= found["naive_before"] * (1 + 1e-6)
    assert found["norm_growth"] <= 1 + 1e-6
    assert 0 < found["membership_auc_before"] < 1
    stored = bundle.compression["unlearning"]
    assert stored == json.loads((done.directory / "unlearning.json").read_text())
    assert stored["settings"]["forget"] == "numbers"
    assert [found["name"] for found in stored["maps"]][-1] == "layers.1.mlp"


def test_certified_deviation_covers_what_is_seen(lipllm, language, texts):
    """Oracle: RMS changes of the logits on random tokens never exceed the proved bound."""
    done = lipllm(
        *("unlearn", f"bundle={language.path}", "data=local", f"data.path={texts}"),
        *("unlearn.forget=words", *FEW),
    )
    bundle = load_bundle(done.directory / "bundle")
    tokens_BT = torch.randint(256, (64, 32))
    with torch.no_grad():
        change = (bundle.model(tokens_BT) - language.model(tokens_BT)).square().mean(-1).sqrt()
    assert 0 < change.max() <= done.metrics["unlearn/certified_deviation"]


def test_digit_is_forgotten_and_compared(lipllm, classifier, tmp_path):
    """Oracle: accuracies; the gap to a second bundle is the difference of the figures."""
    other = tmp_path / "other"
    shutil.copytree(classifier.path, other)
    done = lipllm(
        *("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn.forget=3"),
        *(f"unlearn.retrained={other}", "unlearn.relearn_steps=3"),
    )
    assert done.status == 0, done.err
    found = {name.removeprefix("unlearn/"): value for name, value in done.metrics.items()}
    assert found["forget_acc_held_before"] > 0.8
    assert found["forget_acc_held_after"] < 0.3
    assert found["retain_acc_held_after"] > found["retain_acc_held_before"] - 0.03
    gap = found["forget_acc_held_after"] - found["forget_acc_held_before"]
    assert found["forget_gap"] == pytest.approx(gap)
    assert found["forget_acc_held_retrained"] == found["forget_acc_held_before"]
    assert found["relearn_forget_steps_retrained"] == 0
    assert found["probe_acc_after"] == found["probe_acc_before"]
    assert found["certified_deviation"] > 0
    summary = json.loads((done.directory / "summary.json").read_text())
    assert "not erasure" in json.dumps(summary["notes"])
    bundle = load_bundle(done.directory / "bundle")
    assert bundle.certificate.naive <= classifier.certificate.naive * (1 + 1e-6)


def test_classifier_deviation_covers_what_is_seen(lipllm, classifier):
    """Oracle: changes of the logits on images, real and random."""
    done = lipllm(
        *("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn.forget=3"),
        *("unlearn.layers=1", "unlearn.relearn_steps=0"),
    )
    assert "unlearn/relearn_forget_steps_after" not in done.metrics
    model = load_bundle(done.directory / "bundle").model
    record = json.loads((done.directory / "bundle" / "compression.json").read_text())
    assert record["unlearning"]["holds_for"].startswith("every image of pixels in [0, 1]")
    images = torch.cat([load_digits().val_NI, torch.rand(500, 64)])
    with torch.no_grad():
        change = (model(images) - classifier.model(images)).square().mean(-1).sqrt()
    assert 0 < change.max() <= done.metrics["unlearn/certified_deviation"]


def test_paper_preset_zeroes_on_the_class_alone(lipllm, classifier):
    """Oracle: a fifth of the last map's weights per output is exactly 0; the rest is as it was."""
    done = lipllm(
        *("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn=paper"),
        *("unlearn.forget=0", "unlearn.relearn_steps=0"),
    )
    assert done.status == 0, done.err
    model = load_bundle(done.directory / "bundle").model
    old, new = classifier.model.linears[2].weight, model.linears[2].weight
    assert (new == 0).sum(1).tolist() == [7] * 10
    assert torch.equal(new[new != 0], old[new != 0])


def test_without_a_certificate_there_is_none_afterwards(lipllm, classifier, tmp_path):
    """Oracle: the new bundle's parts; no bound is reported."""
    bare = save_bundle(tmp_path / "bare", classifier.model)
    done = lipllm(
        *("unlearn", f"bundle={bare.path}", "data=digits", "unlearn.forget=0"),
        "unlearn.relearn_steps=0",
    )
    assert load_bundle(done.directory / "bundle").certificate is None
    assert not {"unlearn/naive_after", "unlearn/certified_deviation"} & set(done.metrics)


def test_rebound_is_refused_and_nothing_is_written(lipllm, classifier):
    """Oracle: the published failure: recovery on retained data brings the class back."""
    done = lipllm(
        *("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn.forget=3"),
        *("unlearn.method=neurons", "unlearn.share=0.3", "unlearn.layers=1"),
        "unlearn.recovery=lsq",
    )
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "of the class back" in done.err
    assert not list(Path("runs").rglob("bundle"))


def test_an_interrupted_run_leaves_no_bundle(lipllm, classifier, monkeypatch):
    """Oracle: Ctrl-C while the report is measured."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(standing, "probe", interrupt)
    done = lipllm("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn.forget=3")
    assert done.status == 130
    assert not list(Path("runs").rglob("bundle"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["unlearn.method=wipe"], "unlearn.method='wipe': expected one of ridge"),
        (["unlearn.share=0"], "unlearn.share=0"),
        (["unlearn.mu=-1"], "unlearn.mu=-1"),
        (["unlearn.tau=0"], "unlearn.tau=0"),
        (["unlearn.recovery=lsq"], "unlearn.recovery=lsq: unlearn.method=ridge leaves no weight"),
        (["unlearn.forget=11"], "unlearn.forget=11: expected the number of a class, 0 to 9"),
        (["data=stdlib"], "a classifier, and data is text"),
        (["unlearn.retrained=nowhere"], "unlearn.retrained: bundle=nowhere: no such directory"),
        (["~unlearn.forget"], "forget"),
    ],
)
def test_mistakes_are_one_line(lipllm, classifier, overrides, message):
    """Oracle: status 2, one line that names the value, no bundle."""
    done = lipllm(
        *("unlearn", f"bundle={classifier.path}", "data=digits", "unlearn.forget=3"), *overrides
    )
    assert done.status == 2, done.out
    assert done.err.startswith("lipllm: error: ")
    assert done.err.count("\n") == 1
    assert message in done.err
    assert not list(Path("runs").rglob("bundle"))


def test_images_for_a_language_model_are_refused(lipllm, language):
    """Oracle: one line that says what it takes."""
    done = lipllm("unlearn", f"bundle={language.path}", "data=digits", "unlearn.forget=3")
    assert done.status == 2
    assert "a transformer; it unlearns text" in done.err
