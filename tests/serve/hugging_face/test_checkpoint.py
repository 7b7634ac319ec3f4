"""Folders of ``transformers`` through ``LLM`` and the commands: loading, statistics, refusals."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from common import files
from common.errors import BundleError, ConfigError
from compress.adapters import adapter_for
from compress.checkpoints.checkpoint import load_hf, save_hf
from serve import LLM, SamplingParams
from serve.engine.config import EngineConfig
from serve.hugging_face import HuggingFaceDecoder, load_checkpoint
from serve.kv.calibrate import calibrate
from serve.kv.policies import SnapKVPolicy
from serve.kv.stats_file import write_stats
from serve.loading import load_served

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TEXTS = ["the cat sat", "a dog"]


def test_llm_from_a_folder_equals_generate(hf, folder):
    """Oracle: ``generate`` of the library on the same folder, with its own tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    outputs = LLM(folder).generate(TEXTS, GREEDY)
    for text, output in zip(TEXTS, outputs, strict=True):
        given = tokenizer(text, return_tensors="pt")
        ids = model.generate(**given, do_sample=False, max_new_tokens=24, pad_token_id=0)
        expected = ids[0, given["input_ids"].shape[1] :].tolist()
        assert output.prompt_token_ids == given["input_ids"][0].tolist()
        assert output.token_ids == expected
        assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def uneven(hf, folder, name, layers):
    """Put the model, half of whose heads and neurons are gone in some layers, into its folder."""
    adapter = adapter_for(hf.make_model(name))
    targets = [target for target in adapter.targets() if target.layer in layers]
    small = adapter.cut({target.name: torch.arange(target.inputs // 2) for target in targets})
    (folder / "config.json").unlink()  # a place of ours: only the tokenizer goes along
    save_hf(small, folder.parent / "small", parent=None)
    for file in (folder.parent / "small").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2"])
def test_layers_that_were_pruned_unequally_are_served(hf, folder, name):
    """Oracle: ``generate`` of the library on the model that compress loads; one group per shape."""
    uneven(hf, folder, name, layers=(1,))
    plain, llm = load_hf(folder), LLM(folder)
    assert llm.core.decoder.groups == ((0, 2), (1,))
    prompts = hf.make_prompts([5, 9])
    found = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    assert found == [hf.generated(plain, prompt, 24) for prompt in prompts]
    cut = LLM(folder, kv=SnapKVPolicy(budget=12, interval=4, window=4))
    assert all(output.kv_kept_fraction < 1 for output in cut.generate(prompts, GREEDY))
    (folder / "prune_manifest.json").unlink()
    with pytest.raises(BundleError, match="cannot load it"):
        LLM(folder)


def test_end_tokens_of_the_model_stop_the_text(hf, folder, tmp_path):
    """Oracle: the greedy text without end tokens, cut after the token that is made one."""
    free = LLM(folder).generate(TEXTS[0], GREEDY)[0]
    end = free.token_ids[5]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    llm = LLM(folder)
    first = free.token_ids.index(end)
    stopped = llm.generate(TEXTS[0], GREEDY)[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert llm.generate(TEXTS[0], ignoring)[0].token_ids == free.token_ids


def test_statistics_beside_the_weights_are_used_and_checked(hf, folder):
    """Oracle: the calibration of the same model; another model's file is refused."""
    checkpoint = load_checkpoint(folder)
    assert checkpoint.kv_stats is None
    with pytest.raises(BundleError, match="lipllm calibrate"):
        LLM(checkpoint, kv="triattention")
    stats = calibrate(checkpoint.model, [torch.arange(40).view(2, 20)])
    write_stats(folder / "kv_stats.safetensors", stats, checkpoint.fingerprint)
    stored = load_checkpoint(folder).kv_stats
    assert stored.keys() == stats.keys()
    assert all(torch.equal(stored[key], value) for key, value in stats.items())
    assert LLM(folder, kv="triattention").generate("a", GREEDY)[0].error is None
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("q_proj.weight"))
    state[name][0, 0] += 1
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match="another model"):
        LLM(folder, kv="triattention")
    (folder / "kv_stats.safetensors").write_bytes(b"12345678")
    with pytest.raises(BundleError, match="cannot be read"):
        LLM(folder, kv="triattention")


def test_dtype_and_fingerprint(hf, folder):
    """Oracle: the model's own dtype; rounding the weights changes keys and values."""
    single = load_served(folder)
    half = load_served(folder, dtype="bfloat16")
    assert (single.model.dtype, half.model.dtype) == (torch.float32, torch.bfloat16)
    assert single.fingerprint == half.fingerprint
    assert single.model.fingerprint != half.model.fingerprint
    assert single.model.fingerprint == load_served(folder).model.fingerprint
    assert LLM(folder, engine=EngineConfig(dtype="bfloat16")).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"engine\.dtype=bfloat16"):
        LLM(single, engine=EngineConfig(dtype="bfloat16"))


def test_a_checkpoint_is_hashed_once(folder, monkeypatch):
    """Oracle: files read; an identity does not change while the weights are in memory."""
    checkpoint, read = load_checkpoint(folder), []
    sha256 = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path.name) or sha256(path))
    stats = calibrate(checkpoint.model, [torch.arange(40).view(2, 20)])
    write_stats(folder / "kv_stats.safetensors", stats, checkpoint.fingerprint)
    assert checkpoint.kv_stats.keys() == checkpoint.kv_stats.keys() == stats.keys()
    assert sorted(read) == ["config.json", "model.safetensors"]


def test_what_is_no_usable_checkpoint_is_refused(hf, folder, tmp_path):
    """Oracle: the error contract; a missing tensor would be drawn at random."""
    with pytest.raises(BundleError, match="hf download"):
        load_checkpoint("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match="kv_stats"):
        load_served("tiny-1lip", stats="file")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("q_proj.weight"))
    rest = {key: value for key, value in state.items() if key != name}
    safetensors.torch.save_file(rest, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match="missing"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BundleError, match="cannot load it"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Gemma2", {"head_dim": 8}, "caps its attention logits"),
        ("GptOss", {"head_dim": 8, "num_local_experts": 4}, "attention sinks"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("OPT", {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}, "not rotations"),
        ("Bloom", {"n_layer": 3}, "0 of 3 layers"),
        ("DeepseekV3", {"q_lora_rank": 8, "kv_lora_rank": 8}, "widths"),
    ],
)
def test_models_that_the_cache_cannot_hold_are_refused(hf, kind, changes, reason):
    """Oracle: the error contract: one line that says what is unsupported."""
    with pytest.raises(ConfigError, match=reason) as info:
        HuggingFaceDecoder(hf.build(kind, changes))
    assert "\n" not in str(info.value)


def test_commands_take_a_folder(folder, text_file, lipllm):
    """Oracle: exit status 0, the declared metrics, and the library's greedy text."""
    data = ("data=local", f"data.path={text_file}", "device=cpu")
    done = lipllm("calibrate", f"bundle={folder}", *data, "calibrate.tokens=500")
    assert done.status == 0, done.err
    assert done.metrics["serve/calibration_tokens"] == 2 * (192 - 4)
    kept = ("kv=triattention", "kv.budget=24", "kv.interval=4", "kv.window=8")
    limits = ("sampling.max_tokens=12", "sampling.temperature=0", "generate.eval_windows=1")
    points = ("generate.eval_tokens=64", "generate.frontier=[0.5]", "generate.num_prompts=2")
    done = lipllm("generate", f"bundle={folder}", *data, *kept, *limits, *points)
    assert done.status == 0, done.err
    assert done.metrics["serve/kv_kept_fraction"] < 0.8
    assert 0 < done.metrics["serve/kl_vs_full"] < 100
    samples = json.loads((done.directory / "samples.json").read_text())
    texts = [sample["full"] for sample in samples]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    llm = LLM(folder)
    assert texts == [o.text for o in llm.generate([s["prompt"] for s in samples], params)]
    refused = lipllm("generate", f"bundle={folder}", *data, f"kv_stats={folder}/absent", *kept)
    assert refused.status == 2
    assert "absent" in refused.err
