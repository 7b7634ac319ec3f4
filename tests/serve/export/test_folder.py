"""The exported folder: what is in it, what loads it, what happens to places and proofs."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.bundle import Bundle, load_bundle, save_bundle
from common.errors import BackendError, BundleError
from common.models import LipschitzMLP, LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer
from compress.checkpoints.checkpoint import load_hf
from serve import LLM, SamplingParams
from solvers.bounds.network import certify

transformers = pytest.importorskip("transformers")

PROMPTS = ["def f(x):", "import os", "x = " * 6, "a"]
NEW = 20


def make_model(**changes: Any) -> LipschitzTransformer:
    """Return a byte model with logits far enough apart to generate varied text."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {"position_bias": (True, False), "mlp_width": (64, 30)}
    settings |= {"heads": (4, 2), "kv_heads": (2, 2), "head_dim": (6, 8), "final_scale": 4.0}
    config = ModelConfig(vocab_size=256, width=24, layers=2, context=80, **(settings | changes))
    model = LipschitzTransformer(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        std = 1.0 if "embedding" in name else 0.7 / math.sqrt(24)
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A certified bundle of a model whose layers differ."""
    model = make_model()
    path = tmp_path_factory.mktemp("export") / "bundle"
    return save_bundle(path, model, ByteTokenizer(), certificate=certify(model, tighten=False))


@pytest.fixture(scope="module")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An exported folder with what the Auto classes make of it."""
    from serve.export.folder import export_bundle

    path = tmp_path_factory.mktemp("exported") / "model"
    assert export_bundle(bundle, path) is None
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return SimpleNamespace(path=path, model=model, tokenizer=tokenizer)


def test_an_exported_folder_is_served_by_its_bundle(exported: SimpleNamespace) -> None:
    """Oracle: the error contract, of serving and of pruning: what the folder is, and the remedy."""
    for load in (LLM, load_hf):
        with pytest.raises(BundleError, match=r"written by lipllm export .* give the bundle"):
            load(exported.path)


def test_files(bundle: Bundle, exported: SimpleNamespace) -> None:
    """Oracle: the names that transformers uses; the certificate byte by byte; no code."""
    proof = {"certificate.json", "certificate.safetensors"}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in exported.path.iterdir()} == proof | model | tokenizer | {
        "README.md"
    }
    for name in proof:
        assert (exported.path / name).read_bytes() == (bundle.path / name).read_bytes()
    config = json.loads((exported.path / "config.json").read_text())
    assert config["model_type"] == "lipllm"
    assert config["transformer"] == bundle.config.to_dict()
    assert "auto_map" not in config
    assert [file.name for file in exported.path.parent.iterdir()] == ["model"]


def test_weights_are_the_bundle_s(bundle: Bundle, exported: SimpleNamespace) -> None:
    """Oracle: every tensor of the bundle; the certificate is about them by name."""
    state = bundle.model.state_dict()
    found = exported.model.state_dict()
    assert {name.removeprefix("model.") for name in found} == set(state)
    assert all(torch.equal(found[f"model.{name}"], state[name]) for name in state)


def test_greedy_tokens_are_the_engine_s(bundle: Bundle, exported: SimpleNamespace) -> None:
    """Oracle: ``serve.LLM`` until the two best logits come closer than 1e-3; padded batch."""
    batch = exported.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    tokens = exported.model.generate(**batch, do_sample=False, max_new_tokens=NEW)
    params = SamplingParams(temperature=0.0, max_tokens=NEW)
    width, compared = batch["input_ids"].shape[1], 0
    for row, output in zip(tokens, LLM(bundle).generate(PROMPTS, params), strict=True):
        ids = torch.tensor(output.prompt_token_ids + output.token_ids)
        with torch.no_grad():
            best = bundle.model(ids[None])[0, len(output.prompt_token_ids) - 1 : -1].topk(2).values
        narrow = (best[:, 0] - best[:, 1] < 1e-3).nonzero()
        count = int(narrow[0]) if len(narrow) else NEW
        assert row[width : width + count].tolist() == output.token_ids[:count]
        compared += count
    assert compared >= 2 * NEW


def test_the_read_me_runs(exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: its code block, run where the folder is."""
    text = (exported.path / "README.md").read_text()
    monkeypatch.chdir(exported.path.parent)
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["ids"].shape == (1, 4 + 64)
    assert "certificate.json" in text


def test_rounded_weights_lose_the_certificate(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: rounding by torch; the bundle's model stays as it is."""
    from serve.export.folder import export_bundle

    before = bundle.model.embedding.weight.clone()
    reason = export_bundle(bundle, tmp_path / "half", dtype="bfloat16")
    assert reason is not None
    assert "rounded to bfloat16" in reason
    assert not list((tmp_path / "half").glob("certificate*"))
    assert "no proof" in (tmp_path / "half" / "README.md").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert torch.equal(loaded.model.embedding.weight, before.bfloat16())
    assert torch.equal(bundle.model.embedding.weight, before)


def test_exact_casts_keep_the_certificate(tmp_path: Path) -> None:
    """Oracle: weights that half precision holds exactly are the certified ones."""
    from serve.export.folder import export_bundle

    model = make_model().bfloat16().float()
    proof = certify(model, tighten=False)
    bundle = save_bundle(tmp_path / "bundle", model, ByteTokenizer(), certificate=proof)
    assert export_bundle(bundle, tmp_path / "half", dtype="bfloat16") is None
    assert (tmp_path / "half" / "certificate.json").is_file()


def test_a_model_that_served_is_exported_alike(exported: SimpleNamespace, tmp_path: Path) -> None:
    """Oracle: the file from before; the engine stores matrices in another layout."""
    from serve.export.folder import export_bundle

    served = save_bundle(tmp_path / "bundle", make_model(), ByteTokenizer())
    LLM(served).generate(PROMPTS[:1], SamplingParams(max_tokens=2))
    export_bundle(served, tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (exported.path / name).read_bytes()


def test_without_certificate(tmp_path: Path) -> None:
    """Oracle: a bundle that was never certified."""
    from serve.export.folder import export_bundle

    bundle = save_bundle(tmp_path / "bundle", make_model(), ByteTokenizer())
    reason = export_bundle(bundle, tmp_path / "out")
    assert reason is not None
    assert "certify" in reason


def test_places_that_hold_something(bundle: Bundle, tmp_path: Path) -> None:
    """Oracle: content of the folder before and after; only an export is ever replaced."""
    from serve.export.folder import export_bundle

    place = tmp_path / "place"
    place.mkdir()
    export_bundle(bundle, place)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(BundleError, match="force=true"):
        export_bundle(bundle, place, dtype="bfloat16")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    export_bundle(bundle, place, dtype="bfloat16", replace=True)
    assert not (place / "certificate.json").exists()
    for other, name in ((bundle.path, "config.json"), (tmp_path / "own", "notes.txt")):
        other.mkdir(exist_ok=True)
        (other / name).touch()
        with pytest.raises(BundleError, match="something else"):
            export_bundle(bundle, other, replace=True)
    with pytest.raises(BundleError, match="something else"):
        export_bundle(bundle, tmp_path.root, replace=True)
    assert load_bundle(bundle.path).fingerprint == bundle.fingerprint


def test_nothing_is_left_half_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the folder's content after the disk fails, or the library reads something else."""
    from serve.export import folder

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder.files, "swap_directory", fail)
        with pytest.raises(BundleError, match="No space left"):
            folder.export_bundle(bundle, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_are_equal", lambda *_: False)
        with pytest.raises(BundleError, match="does not read back"):
            folder.export_bundle(bundle, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    """Oracle: it generates nothing."""
    from serve.export.folder import export_bundle

    bundle = save_bundle(tmp_path / "bundle", LipschitzMLP((4, 8, 2)))
    with pytest.raises(BundleError, match="classifier"):
        export_bundle(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_transformers(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an interpreter that cannot import it, or only an older version than needed."""
    from serve.export import library
    from serve.export.folder import export_bundle

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(BackendError, match=r"lipllm\[hf\]"):
            export_bundle(bundle, tmp_path / "out")
    monkeypatch.setattr(library, "OLDEST", (99, 1))
    with pytest.raises(BackendError, match=r"is installed, expected 99\.1 or later"):
        export_bundle(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()
