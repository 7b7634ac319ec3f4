"""The bench on folders of ``transformers``, and what its rows depend on beside the weights."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import BundleError, DataError
from common.tasks import Recall
from serve import LLM, SamplingParams
from serve.bench import quality
from serve.bench.policies import compared, usable
from serve.bench.retrieval import measure_tasks
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.kv.calibrate import calibrate
from serve.kv.stats_file import write_stats
from serve.loading import load_served

VOCAB, CONTEXT = 97, 192


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a byte-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        initializer_range=0.3, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    path = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in letters if c.isascii() or c == "\u0120"][: VOCAB - 1]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)
    return path


def test_command_measures_a_checkpoint(
    lipllm: Callable, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Oracle: the contract: all parts run, one table joins them, no certified column."""
    done = lipllm(
        "bench", f"bundle={folder}", "data=local", f"data.path={text_file}", "device=cpu",
        "bench.parts=[quality,speed,baseline]", "bench.policies=[window]", "bench.budgets=[0.25]",
        "bench.windows=2", "bench.summaries=[0,1]", "bench.batches=[1]", "bench.steps=2",
        "bench.rounds=1", f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.status == 0, done.err
    (joined,) = (line for line in done.out.splitlines() if "perplexity" in line)
    assert "KL, nats" in joined
    assert f"times full, {CONTEXT} x 1" in joined
    assert "certified" not in done.out
    assert "cpu, 1 thread, processor seconds" in done.out


def test_recalibration_makes_the_rows_of_its_policies_again(
    lipllm: Callable, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Oracle: figures of the new statistics replace the old ones; other rows stay as they are."""
    words = (
        "bench", f"bundle={folder}", "data=local", f"data.path={text_file}", "device=cpu",
        "bench.parts=[quality]", "bench.policies=[window,triattention]", "bench.budgets=[0.1]",
        "bench.windows=1", f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    refused = lipllm(*words)
    assert refused.status == 2
    assert "run lipllm calibrate" in refused.err
    assert not (tmp_path / "run").exists()
    kept = []
    for seed in (1, 2, 2):
        served = load_served(folder)
        text = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
        stats = calibrate(served.model, [text])
        write_stats(folder / "kv_stats.safetensors", stats, served.fingerprint)
        done = lipllm(*words)
        assert done.status == 0, done.err
        rows = json.loads((tmp_path / "run" / "bench.json").read_text())["rows"]
        kept.append({row["policy"]: row for row in rows})
    first, second, third = kept
    assert list(first) == list(second) == ["full", "window", "triattention"]
    assert first["window"] == second["window"]
    assert first["triattention"]["stats"] != second["triattention"]["stats"]
    assert first["triattention"]["kl_vs_full"] != second["triattention"]["kl_vs_full"]
    assert second == third


def test_policies_without_statistics_are_left_out_or_refused(folder: Path) -> None:
    """Oracle: the contract: silently only where nobody asked for them; damage is an error."""
    served = load_served(folder)
    assert "triattention" not in usable(BenchConfig(), served).compressing
    assert "window" in usable(BenchConfig(), served).compressing
    with pytest.raises(BundleError, match="lipllm calibrate"):
        usable(BenchConfig(policies=("triattention",)), served)
    write_stats(folder / "kv_stats.safetensors", {"tokens": torch.tensor(1)}, "another model")
    with pytest.raises(BundleError, match="another model"):
        usable(BenchConfig(), served)


def test_answers_of_a_checkpoint_count_in_its_tokens(folder: Path, tmp_path: Path) -> None:
    """Oracle: one token per character here; a tokenizer that loses characters is refused."""
    settings = BenchConfig(policies=("window",), budgets=(0.25,), examples=2, summaries=(0, 1))
    rows = Rows(tmp_path / "bench.json", {})
    served = load_served(folder)
    measure_tasks(rows, settings, served, Recall(length=60, needles=2))
    assert [row.get("tokens") for row in rows] == [None] + [15] * 4
    assert [row.get("summary_tokens") for row in rows] == [None, 0, 1, 0, 1]
    assert [row.get("query") for row in rows] == [None, "known", "known", "late", "late"]
    served.tokenizer.encode = lambda text: np.array([0] * len(text))
    with pytest.raises(DataError, match="does not give its text back"):
        measure_tasks(rows, settings, served, Recall(length=60, needles=2))


def test_known_questions_are_first_answered_from_the_full_cache(folder: Path) -> None:
    """Oracle: the full cache's first token; it may differ only where the prompt was cut before."""
    served = load_served(folder)
    prompts = [example.prompt for example in Recall(length=120, needles=2).examples(6)]
    first = SamplingParams(temperature=0.0, max_tokens=1)
    settings = BenchConfig(policies=("window",))

    def answers(**options: bool) -> list[list[int]]:
        ((_, policy),) = compared(settings, 8, **options)
        return [out.token_ids for out in LLM(served, kv=policy).generate(prompts, first)]

    full = [out.token_ids for out in LLM(served).generate(prompts, first)]
    assert answers(compress_prefill=False) == full
    assert answers(compress_prefill=True) != full


def test_windows_in_groups_give_the_same_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: all windows in one pass."""
    served = load_served(folder)
    windows = torch.randint(VOCAB, (5, 41), generator=torch.Generator().manual_seed(0))
    settings = BenchConfig(policies=("window",), budgets=(0.25,))
    found = []
    for logits in (1 << 28, 2 * 40 * VOCAB):
        monkeypatch.setattr(quality, "LOGITS", logits)
        rows = Rows(tmp_path / f"{logits}.json", {})
        quality.measure_quality(rows, settings, served, windows, None)
        found.append(list(rows))
    for whole, parts in zip(*found, strict=True):
        assert whole.keys() == parts.keys()
        assert "certified_deviation" not in whole
        for name, value in whole.items():
            assert parts[name] == (pytest.approx(value) if isinstance(value, float) else value)
