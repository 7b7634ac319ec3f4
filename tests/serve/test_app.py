"""The calibrate and generate commands on a tiny certified bundle: files, metrics, bad input."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.bundle import save_bundle
from common.models import LipschitzTransformer, ModelConfig
from common.tokenizer import ByteTokenizer, CharTokenizer
from common.tracking import is_declared
from serve.engine.runner import Runner
from solvers.bounds.network import certify

CONTEXT = 48
QUICK = ("generate.eval_tokens=48", "sampling.max_tokens=12", "device=cpu")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An untrained certified byte model on the disk."""
    config = ModelConfig(vocab_size=256, width=16, layers=2, heads=2, context=CONTEXT)
    model = LipschitzTransformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7 / math.sqrt(16))
    certificate = certify(model, tighten=False)
    return save_bundle(tmp_path / "b", model, ByteTokenizer(), certificate=certificate).path


def test_calibrate_then_generate(lipllm: Callable, bundle: Path, text_file: Path) -> None:
    """Oracle: the summary's contract: declared names, files, measured below certified."""
    data = ("data=local", f"data.path={text_file}", "device=cpu", f"bundle={bundle}")
    assert lipllm("calibrate", *data, "calibrate.tokens=2000").status == 0
    kv = ("kv=triattention", "kv.budget=12", "kv.interval=4", "kv.sinks=2", "kv.window=4")
    done = lipllm("generate", *data, *kv, *QUICK, "generate.frontier=[0.5]")
    assert done.status == 0, done.err
    assert "--- triattention, 12 tokens kept" in done.out
    path = Path(done.out.strip().splitlines()[-1].removeprefix("summary: "))
    summary = json.loads(path.read_text())
    metrics = summary["metrics"]
    assert all(is_declared(name) for name in metrics)
    assert 0 < metrics["serve/measured_deviation"] <= metrics["serve/certified_deviation"]
    assert 0 < metrics["serve/kv_kept_fraction"] < 1
    assert metrics["serve/kl_vs_full"] > 0
    assert metrics["serve/generated_tokens"] == 36
    samples = json.loads((path.parent / summary["artifacts"]["samples"]).read_text())
    assert all(sample["prompt"] and "full" in sample for sample in samples)
    # Nothing is evicted before the first compaction; from then on each token has its own bound.
    for bounds in (sample["certified_deviation"] for sample in samples):
        assert len(bounds) == 12
        assert bounds == sorted(bounds)
        assert bounds[0] == 0 < bounds[-1]
    assert [len(sample["certified_top1"]) for sample in samples] == [12] * 3
    rows = json.loads((path.parent / summary["artifacts"]["kv_frontier"]).read_text())
    kinds = [(row["policy"], row["budget"]) for row in rows]
    frontier = [("window", 24), ("keydiff", 24), ("triattention", 24)]
    assert kinds == [("triattention", 12), ("full", 48), *frontier]
    assert rows[1]["kl_vs_full"] == rows[1]["certified_deviation"] == 0


def test_generate_continues_given_prompts_without_a_corpus(lipllm: Callable, bundle: Path) -> None:
    """Oracle: no evaluation asked for, so no text is prepared; the same seed, the same text."""
    arguments = ("generate", f"bundle={bundle}", *QUICK, "generate.eval_windows=0")
    first = lipllm(*arguments, "generate.prompts=[def ,import]", "seed=4")
    again = lipllm(*arguments, "generate.prompts=[def ,import]", "seed=4", "engine=deterministic")
    other = lipllm(*arguments, "generate.prompts=[def ,import]", "seed=5")
    texts = [run.out.rsplit("summary:", 1)[0] for run in (first, again, other)]
    assert first.status == again.status == other.status == 0, first.err
    assert texts[0] == texts[1] != texts[2]
    assert not Path(".cache").exists()


def test_generate_stores_what_sampling_asks_for(lipllm: Callable, bundle: Path) -> None:
    """Oracle: a bias beyond all logits leaves one token; a row per token, itself first."""
    options = (*QUICK, "generate.eval_windows=0", "generate.prompts=[def]")
    more = ("sampling.n=2", "sampling.logprobs=1", "sampling.prompt_logprobs=0")
    done = lipllm("generate", f"bundle={bundle}", *options, *more, "sampling.logit_bias={97: 100}")
    assert done.status == 0, done.err
    assert "--- full cache\naaaaaaaaaaaa\n" in done.out
    (sample,) = json.loads(next(Path("runs").rglob("samples.json")).read_text())
    assert sample["choices"] == ["a" * 12]
    assert [next(iter(row)) for row in sample["logprobs"]] == ["97"] * 12
    assert [list(row) for row in sample["prompt_logprobs"]] == [["101"], ["102"]]


def test_generate_says_why_a_character_model_is_not_compared(
    lipllm: Callable, tmp_path: Path
) -> None:
    """Oracle: the default text holds more than ten characters; the prompt is continued anyway."""
    config = ModelConfig(vocab_size=10, width=16, layers=1, heads=2, context=CONTEXT)
    model = LipschitzTransformer(config).eval()
    path = save_bundle(tmp_path / "c", model, CharTokenizer("abcdefghij")).path
    done = lipllm("generate", f"bundle={path}", *QUICK, "generate.prompts=[abc]")
    assert done.status == 0, done.err
    (line,) = [x for x in (done.out + done.err).splitlines() if "are not compared" in x]
    assert "data=stdlib is program code" in line
    assert "data=local data.path=FILE" in line
    assert "--- full cache" in done.out


@pytest.mark.parametrize("failing", [1, 2])
def test_generate_fails_when_every_prompt_failed(
    lipllm: Callable, bundle: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Oracle: one line and status 2 where nothing was generated, 0 where something was."""
    forward, calls = Runner.forward, iter(range(99))

    def fault(self: Runner, *args: object, **kwargs: object) -> torch.Tensor:
        if next(calls) < failing:
            raise ValueError("a fault\nwith details")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "forward", fault)
    # One prompt runs at a time: as many fail as there are faults.
    options = (*QUICK, "generate.eval_windows=0", "engine.max_num_seqs=1")
    done = lipllm("generate", f"bundle={bundle}", *options, "generate.prompts=[a,b]")
    assert done.status == (2 if failing == 2 else 0)
    lines = [line for line in done.err.splitlines() if line.startswith("lipllm: error")]
    expected = "every prompt ended with an error, the first with: ValueError: a fault"
    assert lines == [f"lipllm: error: {expected}"] * (failing == 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((f"generate.prompts=[{'x' * 60}]",), f"60 tokens, the model's context is {CONTEXT}"),
        (("generate.prompt_file=missing.txt",), "missing.txt: No such file"),
        (("generate.frontier=[2]",), "generate.frontier"),
        (("generate.policies=[newest]",), "expected one of"),
        (("sampling.temperature=-1", "generate.prompts=[a]"), "temperature=-1"),
        (("sampling.max_tokens=many", "generate.prompts=[a]"), "max_tokens"),
        (("kv=triattention", "generate.prompts=[a]"), "calibrate"),
        (("kv=window", "kv.budget=3", "generate.prompts=[a]"), "kv.budget=3"),
        (("engine.block_size=12", "generate.prompts=[a]"), "block_size=12"),
        (("engine.backend=triton", "generate.prompts=[a]"), "expected one of auto, torch"),
        (("engine.num_blocks=1", "generate.prompts=[a]"), "num_blocks"),
    ],
)
def test_generate_explains_bad_input_in_one_line(
    lipllm: Callable, bundle: Path, arguments: tuple[str, ...], words: str
) -> None:
    """Oracle: exit status 2, one line that names the value, and no run left behind."""
    options = ("sampling.max_tokens=30", "generate.eval_windows=0", "device=cpu")
    failed = lipllm("generate", f"bundle={bundle}", *options, *arguments)
    assert failed.status == 2
    lines = [line for line in failed.err.splitlines() if line.startswith("lipllm: error")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(Path("runs").rglob("samples.json"))
