"""Shipped models: found by name, complete, and never written to."""

import stat

import pytest
import torch

from common import locate
from common.bundle import extend_bundle, load_bundle, resolve_bundle, save_bundle
from common.errors import BundleError, CertificateError
from common.files import sha256_file
from common.locate import SHIPPED_BYTES, is_shipped, shipped_bundles
from common.models import LipschitzTransformer, ModelConfig
from common.provenance import describe_training
from common.tokenizer import ByteTokenizer, CharTokenizer
from solvers.bounds import certify, verify
from train.groups import Constraint
from train.init import initialise


def make_model():
    """Return a small model whose certificate is finite."""
    config = ModelConfig(vocab_size=256, width=16, layers=1, heads=2, context=16)
    torch.manual_seed(0)
    model = LipschitzTransformer(config)
    initialise(model, Constraint(w_max=1.0), 0)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Return a certified, read-only bundle stored in bfloat16, in a package folder of its own."""
    monkeypatch.setattr(locate, "SHIPPED_FOLDER", tmp_path / "package" / "shipped")
    path = tmp_path / "package" / "shipped" / "tiny-1lip"
    draft = save_bundle(tmp_path / "draft", make_model(), ByteTokenizer(), dtype=torch.bfloat16)
    save_bundle(
        path,
        draft.model,
        draft.tokenizer,
        certificate=certify(draft.model, tighten=False),
        provenance=describe_training(command="lipllm train", seed=3),
        dtype=torch.bfloat16,
    )
    for place in (path, path.parent):
        place.chmod(0o555)
    yield path
    for place in (path, path.parent):
        place.chmod(0o755)


def snapshot(path):
    """Return names, content hashes and times of a directory and its files."""
    files = sorted(path.iterdir())
    facts = [(f.name, sha256_file(f), f.stat().st_mtime_ns) for f in files]
    return facts, path.stat().st_mtime_ns, sorted(p.name for p in path.parent.iterdir())


def test_half_precision_is_stored_and_float32_computes(shipped):
    """Oracle: the file is half as large, the numbers are those of a float32 model cast once."""
    bundle = load_bundle("tiny-1lip")
    expected = make_model().bfloat16().float()
    for name, tensor in bundle.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected.state_dict()[name])
    weights = sum(tensor.numel() for tensor in expected.state_dict().values())
    assert (shipped / "model.safetensors").stat().st_size < 2 * weights + 4096
    assert bundle.certificate.naive == verify("tiny-1lip").naive


def test_certificate_of_unrounded_weights_is_refused(tmp_path):
    """Oracle: rounding changes the weights, so a proof about the others is void."""
    model = make_model()
    with pytest.raises(CertificateError, match="other weights"):
        save_bundle(
            tmp_path / "b",
            model,
            ByteTokenizer(),
            certificate=certify(model, tighten=False),
            dtype=torch.bfloat16,
        )


def test_names_resolve_and_directories_win(shipped, tmp_path, monkeypatch):
    """Oracle: the name from anywhere; a directory of the same name is nearer."""
    assert shipped_bundles() == {"tiny-1lip": shipped}
    assert resolve_bundle("tiny-1lip") == shipped
    assert is_shipped(shipped)
    assert not is_shipped(tmp_path / "draft")
    with pytest.raises(BundleError, match=r"shipped: tiny-1lip"):
        resolve_bundle("tiny-2lip")
    save_bundle(tmp_path / "tiny-1lip", make_model(), ByteTokenizer())
    assert resolve_bundle("tiny-1lip") == tmp_path / "tiny-1lip"


def test_extending_never_writes_to_the_installation(shipped, tmp_path):
    """Oracle: hashes and times of everything in the package; the copy holds the new part."""
    before = snapshot(shipped)
    stats = {"a": torch.ones(2)}
    with pytest.raises(BundleError, match=r"tiny-1lip: a shipped model .* give the copy"):
        extend_bundle("tiny-1lip", kv_stats=stats)
    copy = extend_bundle("tiny-1lip", kv_stats=stats, copy_to=tmp_path / "mine", command="c")
    assert copy.path == tmp_path / "mine"
    assert torch.equal(copy.kv_stats["a"], stats["a"])
    assert copy.fingerprint == load_bundle("tiny-1lip").fingerprint
    assert copy.provenance["seed"] == 3
    assert stat.S_IMODE(copy.path.stat().st_mode) == 0o755
    assert snapshot(shipped) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="something else than a bundle"):
        extend_bundle("tiny-1lip", kv_stats=stats, copy_to=tmp_path / "full")


def test_children_inherit_the_provenance(shipped, tmp_path):
    """Oracle: the parent's training text and seed are the child's; its own record wins."""
    parent = load_bundle("tiny-1lip")
    child = save_bundle(tmp_path / "child", parent.model, parent.tokenizer, parent=parent)
    assert child.provenance == parent.provenance
    own = save_bundle(
        tmp_path / "own", parent.model, parent.tokenizer, parent=parent, provenance={"seed": 9}
    )
    assert own.provenance == {"seed": 9}


def test_damaged_provenance_is_named(tmp_path):
    """Oracle: the manifest's hash."""
    save_bundle(tmp_path / "b", make_model(), ByteTokenizer(), provenance={"seed": 1})
    file = tmp_path / "b" / "provenance.json"
    file.write_text(file.read_text().replace("1", "2"))
    with pytest.raises(BundleError, match=r"provenance\.json"):
        load_bundle(tmp_path / "b")


def test_a_checkpoint_of_transformers_is_called_what_it_is(tmp_path):
    """Oracle: the message names the folder, what it is and the command that reads it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BundleError, match="calibrate and generate read checkpoints") as info:
        resolve_bundle(tmp_path)
    assert str(info.value).startswith(f"bundle={tmp_path}: a checkpoint of transformers")


@pytest.mark.e2e
def test_commands_take_the_name(shipped, tmp_path, lipllm):
    """Oracle: verify re-proves, certify works on a copy, doctor lists; the package is untouched."""
    before = snapshot(shipped)
    assert lipllm("verify", "bundle=tiny-1lip").status == 0
    certified = lipllm(
        "certify", "bundle=tiny-1lip", "certify.tighten=false", "certify.attack_steps=0",
        f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert certified.status == 0, certified.err
    assert (tmp_path / "run" / "bundle" / "certificate.json").is_file()
    assert "tiny-1lip" in lipllm("doctor").out
    generated = lipllm(
        "generate", "bundle=tiny-1lip", "generate.prompts=[ab]", "generate.eval_windows=0",
        "sampling.max_tokens=4", "logger=none",
    )  # fmt: skip
    assert generated.status == 0, generated.err
    assert snapshot(shipped) == before


@pytest.mark.e2e
def test_character_model_generates_without_any_setting(tmp_path, monkeypatch, lipllm):
    """Oracle: the default text holds other characters; the model starts from an empty line."""
    monkeypatch.setattr(locate, "SHIPPED_FOLDER", tmp_path / "shipped")
    alphabet = "\n abcdefghijklmnopqrstuvwxyz"
    config = ModelConfig(vocab_size=len(alphabet), width=16, layers=1, heads=2, context=16)
    model = LipschitzTransformer(config)
    save_bundle(tmp_path / "shipped" / "letters", model, CharTokenizer(alphabet))
    done = lipllm("generate", "bundle=letters", "sampling.max_tokens=4", "logger=none")
    assert done.status == 0, done.err
    assert "--- prompt" in done.out
    refused = lipllm("generate", "bundle=letters", "data=local", "data.path=nowhere", "logger=none")
    assert refused.status == 2
    assert "nowhere" in refused.err


@pytest.mark.parametrize("name", sorted(shipped_bundles()))
def test_every_shipped_model_is_small_proved_and_has_a_history(name):
    """Oracle: the size limit, the independent checker, and the required provenance fields."""
    bundle = load_bundle(name)
    assert sum(file.stat().st_size for file in bundle.path.iterdir()) <= SHIPPED_BYTES
    verify(name)
    assert {"command", "seed", "corpus", "versions"} <= set(bundle.provenance)
    assert len(bundle.provenance["corpus"]["text_sha256"]) == 64
    text = bundle.provenance["command"] + " ".join(bundle.manifest["commands"])
    assert "/" not in text
