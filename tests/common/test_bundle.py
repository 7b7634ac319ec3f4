"""The model directory: exact round trip, every damage named, never half-written."""

import errno
import hashlib
import json
import multiprocessing
import os

import pytest
import safetensors.torch
import torch

from common import bundle_format, files
from common.bundle import extend_bundle, load_bundle, resolve_bundle, save_bundle
from common.certificate import Certificate, config_sha256, tensors_sha256
from common.errors import BackendError, BundleError, CertificateError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer, CharTokenizer


def make_model(seed=0, **changes):
    """Return a small model; ``changes`` are fields of its configuration."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 256, "width": 16, "layers": 2, "heads": 4, "context": 16}
    return LipschitzTransformer(ModelConfig(**(shape | changes)))


def make_certificate(model):
    """Return a certificate without proofs that carries the hashes of ``model``."""
    config = model.config
    return Certificate(
        width=config.width, vocab_size=config.vocab_size, radius=1.0, blocks=(), head_norm=1.0,
        pair_norm=1.0, stream=2.0, reference=1.0, naive=3.0, tightened=2.0, log10_reference=0.0,
        log10_naive=0.5, log10_tightened=0.4, weights_sha256=tensors_sha256(model.state_dict()),
        config_sha256=config_sha256(config), multipliers={"a": torch.ones(3, dtype=torch.float64)},
    )  # fmt: skip


def rehash(path):
    """Rewrite the manifest so that it agrees with edited files: only deeper checks remain."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    manifest["fingerprint"] = bundle_format.fingerprint(manifest["files"])
    (path / "manifest.json").write_text(json.dumps(manifest))


def names_around(path):
    """Return what lies beside a bundle: staged rubbish would show here."""
    return sorted(entry.name for entry in path.parent.iterdir())


@pytest.fixture
def path(tmp_path):
    """Return a certified bundle on the disk."""
    model = make_model()
    where = tmp_path / "bundle"
    save_bundle(where, model, ByteTokenizer(), certificate=make_certificate(model), command="a b")
    return where


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "heads": (4, 2), "kv_heads": (2, 1), "content_heads": (2, 0), "head_dim": (4, 6),
            "mlp_width": (10, 34), "activation": ("maxmin", "gelu"), "mlp_bias": True,
            "position_bias": (True, False), "head_bias": True, "final_scale": 0.1 + 0.2,
        },
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_bit_exact(tmp_path, changes, dtype):
    """Oracle: identity, for equal and for per-layer different shapes, in every precision."""
    model = make_model(**changes).to(dtype)
    stats = {
        "layer.0": torch.randn(3, 2, dtype=torch.float64),
        "view": torch.arange(6).view(2, 3).T,
    }
    tokenizer = CharTokenizer("abc")
    saved = save_bundle(
        tmp_path / "b", model, tokenizer, compression={"removed": [1, 2]}, kv_stats=stats
    )
    before = torch.random.get_rng_state()
    loaded = load_bundle(tmp_path / "b")
    assert torch.equal(before, torch.random.get_rng_state())
    assert loaded.config == model.config
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.tokenizer.alphabet == "abc"
    assert loaded.compression == {"removed": [1, 2]}
    assert loaded.certificate is None
    for name, tensor in model.state_dict().items():
        exact = torch.float32 if dtype == torch.bfloat16 else dtype
        assert loaded.model.state_dict()[name].dtype == exact
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    for name, tensor in stats.items():
        assert torch.equal(loaded.kv_stats[name], tensor)
    assert not list((tmp_path / "b").glob("*.p*kl*"))
    assert names_around(tmp_path / "b") == ["b"]


def test_classifier_round_trip(tmp_path):
    """Oracle: identical outputs."""
    model = LipschitzMLP([5, 7, 3], activation="abs", bias=False)
    save_bundle(tmp_path / "c", model)
    loaded = load_bundle(tmp_path / "c")
    x = torch.randn(4, 5)
    assert loaded.kind == "classifier"
    assert loaded.tokenizer is None
    assert loaded.config == {"sizes": [5, 7, 3], "activation": "abs", "bias": False}
    assert torch.equal(loaded.model(x), model(x))


def test_parent_and_commands_are_recorded(path, tmp_path):
    """Oracle: the manifest names the parent's fingerprint and every command in order."""
    parent = load_bundle(path)
    child = save_bundle(
        tmp_path / "child", make_model(1), ByteTokenizer(), parent=parent, compression={"x": 1}
    )
    assert child.manifest["parent"] == parent.fingerprint == child.compression["parent_fingerprint"]
    assert child.fingerprint != parent.fingerprint
    extended = extend_bundle(path, kv_stats={"a": torch.ones(1)}, command="c d")
    assert extended.manifest["commands"] == ["a b", "c d"]
    assert extended.fingerprint == parent.fingerprint
    assert extended.certificate.tightened == 2.0


@pytest.mark.parametrize("name", [*bundle_format._IDENTITY, *bundle_format.CERTIFICATE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_named(path, name, damage):
    """Oracle: any changed byte of any file is refused, by the file's name."""
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-3]))
    with pytest.raises(BundleError, match=name) as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)


def test_flipped_weight_names_the_tensor(path):
    """Oracle: the certificate's own hashes tell which tensor changed."""
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors["layers.1.mlp.up.weight"].view(torch.int32)[3, 2] ^= 1
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(BundleError, match=r"tensor layers\.1\.mlp\.up\.weight"):
        load_bundle(path)


def test_certificate_of_other_weights_is_void(path):
    """Oracle: with a consistent manifest only the certificate's hashes can tell, and they do."""
    safetensors.torch.save_file(make_model(1).state_dict(), path / "model.safetensors")
    rehash(path)
    bundle = load_bundle(path)
    assert "certify bundle=" in bundle.void
    with pytest.raises(CertificateError, match="void"):
        _ = bundle.certificate
    with pytest.raises(CertificateError, match="void"):
        extend_bundle(path, certificate=make_certificate(make_model(2)))
    repaired = extend_bundle(path, certificate=make_certificate(make_model(1)))
    assert repaired.certificate.naive == 3.0


def test_certificate_of_other_config_is_void(path):
    """Oracle: same weights, another constant in the configuration."""
    content = json.loads((path / "config.json").read_text())
    content["transformer"]["final_scale"] = 2.0
    (path / "config.json").write_text(json.dumps(content))
    rehash(path)
    assert "configuration" in load_bundle(path).void


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(format_version=9), "format version 9"),
        (lambda c: c.update(kind="spell"), "spell"),
        (lambda c: c["transformer"].update(wings=2), "wings"),
        (lambda c: c["transformer"].update(mlp_width=[64, 32]), "layers.1.mlp"),
        (lambda c: c["transformer"].update(heads=[4, -1]), "heads"),
    ],
)
def test_foreign_configuration_is_refused(path, edit, expected):
    """Oracle: a manifest made consistent again does not help a wrong configuration."""
    content = json.loads((path / "config.json").read_text())
    edit(content)
    (path / "config.json").write_text(json.dumps(content))
    rehash(path)
    with pytest.raises(BundleError, match=expected):
        load_bundle(path)


def test_truncated_weights_with_consistent_manifest(path):
    """Oracle: safetensors' own length check, reported with the file's name."""
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    rehash(path)
    with pytest.raises(BundleError, match=r"model\.safetensors.*complete"):
        load_bundle(path)


def test_planted_file_and_foreign_manifest_are_refused(path):
    """Oracle: a part that the manifest does not list is not trusted; nor is a future format."""
    (path / "compression.json").write_text("{}")
    with pytest.raises(BundleError, match="not listed"):
        load_bundle(path)
    (path / "compression.json").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(BundleError, match="format version 2"):
        load_bundle(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="JSON"):
        load_bundle(path)
    escape = manifest | {"files": manifest["files"] | {"../x": "0"}}
    (path / "manifest.json").write_text(json.dumps(escape))
    with pytest.raises(BundleError, match="missing"):
        load_bundle(path)


def test_absurd_sizes_and_nesting_are_one_line(path):
    """Oracle: files that are consistent with their hashes, but that no program wrote."""
    config = json.loads((path / "config.json").read_text())
    config["transformer"]["width"] = 4 * 10**12
    (path / "config.json").write_text(json.dumps(config))
    rehash(path)
    with pytest.raises(BundleError, match=r"config\.json: .*restore") as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)
    (path / "config.json").write_text("[" * 100_000)
    rehash(path)
    with pytest.raises(BundleError, match=r"config\.json: not JSON"):
        load_bundle(path)


@pytest.mark.parametrize("action", ["save", "extend"])
def test_full_disk_leaves_the_old_bundle(path, monkeypatch, action):
    """Oracle: with ENOSPC at each flush in turn the old files are bit-identical, no rubbish."""
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    certificate = make_certificate(load_bundle(path).model)
    real, left = os.fsync, [0]

    def fsync(handle):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(handle)

    def write():
        if action == "save":
            return save_bundle(path, make_model(3), ByteTokenizer(), kv_stats={"a": torch.ones(1)})
        return extend_bundle(path, certificate=certificate, compression={"x": 1})

    monkeypatch.setattr(os, "fsync", fsync)
    messages = []
    for allowed in range(100):
        left[0] = allowed
        try:
            write()
        except BundleError as error:
            messages.append(str(error))
        else:
            break
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        assert names_around(path) == ["bundle"]
    assert len(messages) >= len(before)
    assert all("No space left on device" in text and "\n" not in text for text in messages)


def test_interrupt_while_writing_leaves_the_old_bundle(path, monkeypatch):
    """Oracle: Ctrl-C passes through and takes the staged files with it."""
    before = load_bundle(path).fingerprint

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(path, make_model(3), ByteTokenizer())
    assert load_bundle(path).fingerprint == before
    assert names_around(path) == ["bundle"]


def test_crash_between_the_two_renames_is_recovered(path):
    """Oracle: the state after the first rename, made by hand, loads as the old bundle."""
    before = load_bundle(path).fingerprint
    path.rename(files.backup_path(path))
    assert load_bundle(path).fingerprint == before
    assert names_around(path) == ["bundle"]


def test_crash_after_the_swap_leaves_the_new_bundle(path):
    """Oracle: a leftover backup is ignored when loading and gone after the next write."""
    before = load_bundle(path).fingerprint
    files.backup_path(path).mkdir()
    assert load_bundle(path).fingerprint == before
    extend_bundle(path, kv_stats={"a": torch.ones(1)})
    assert names_around(path) == ["bundle"]


def _add_command(path, label):
    extend_bundle(path, command=label)


def test_parallel_extensions_lose_nothing(path):
    """Oracle: each of four processes' commands is in the manifest, readers never fail."""
    context = multiprocessing.get_context("fork")
    labels = [f"command {index}" for index in range(4)]
    workers = [context.Process(target=_add_command, args=(path, label)) for label in labels]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        load_bundle(path)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(load_bundle(path).manifest["commands"]) == ["a b", *labels]


def test_foreign_directory_is_never_overwritten(tmp_path):
    """Oracle: the user's own files stay."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for target in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(BundleError, match="something else"):
            save_bundle(target, make_model(), ByteTokenizer())
    assert (tmp_path / "mine" / "notes.txt").read_text() == "x"


def test_save_refuses_wrong_parts(tmp_path):
    """Oracle: errors before anything is written."""
    model = make_model()
    with pytest.raises(CertificateError, match="other weights"):
        save_bundle(
            tmp_path / "b", model, ByteTokenizer(), certificate=make_certificate(make_model(1))
        )
    with pytest.raises(BundleError, match="tokenizer"):
        save_bundle(tmp_path / "b", model)
    with pytest.raises(BundleError, match="Linear"):
        save_bundle(tmp_path / "b", torch.nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_resolve_bundle(path, tmp_path):
    """Oracle: directory, run directory, and messages that name the remedy."""
    assert resolve_bundle(path) == path
    assert resolve_bundle(tmp_path) == path
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        resolve_bundle(tmp_path / "empty")
    with pytest.raises(BundleError, match=r"shipped: .*lipllm train"):
        resolve_bundle("demo-9000")
    for value in (None, 5):
        with pytest.raises(BundleError, match=f"bundle={value}: expected a directory"):
            resolve_bundle(value)


def test_missing_device_is_a_backend_error(path):
    """Oracle: a device that no machine has."""
    with pytest.raises(BackendError, match="device=cuda:97"):
        load_bundle(path, device="cuda:97")
