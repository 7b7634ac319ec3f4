"""The bench: rows against direct computation, resuming, the command and its errors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.bundle import load_bundle, save_bundle
from common.errors import ConfigError, DataError
from common.models import LipschitzTransformer, ModelConfig
from common.tasks import Recall
from common.tokenizer import CharTokenizer
from common.tracking import is_declared
from serve.bench import retrieval
from serve.bench.policies import budget_tokens, compared
from serve.bench.quality import measure_quality
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig, SpeedModel
from serve.bench.speed import measure_speed, random_model
from serve.evaluate import score_policy

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
TASK = Recall(length=60, needles=2)
FLOAT32 = 1e-5  # losses of a few nats


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An untrained character model."""
    config = ModelConfig(vocab_size=len(ALPHABET), width=16, layers=2, heads=2, context=96)
    model = LipschitzTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return save_bundle(tmp_path / "b", model, CharTokenizer(ALPHABET)).path


def test_rows_are_measured_once_and_belong_to_one_bench(tmp_path: Path) -> None:
    """Oracle: the contract: a stored row is not measured again, foreign rows are refused."""
    calls = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"x": 1.0}

    for _ in range(2):
        rows = Rows(tmp_path / "bench.json", {"bundle": "a"})
        rows.make("quality", {"policy": "window"}, measure)
    rows.make("tasks", {"policy": "window"}, measure)
    assert len(calls) == 2
    assert [row["part"] for row in rows] == ["quality", "tasks"]
    with pytest.raises(DataError, match="force=true"):
        Rows(tmp_path / "bench.json", {"bundle": "b"})


def test_all_policies_grow_by_the_same_share() -> None:
    """Oracle: the documented keys; the full cache is the reference, never a candidate."""
    settings = BenchConfig(policies=("full", "window", "random"), summaries=(0, 1))
    found = list(compared(settings, 40, compress_prefill=True))
    assert [tuple(keys.values()) for keys, _ in found] == [
        ("window", 0), ("window", 1), ("random", 0), ("random", 1)
    ]  # fmt: skip
    assert {(p.budget, p.interval, p.compress_prefill) for _, p in found} == {(40, 10, True)}
    assert [p.summary_tokens for _, p in found] == [0, 1, 0, 1]
    assert budget_tokens(0.001, 100) == 4


def test_quality_rows_equal_direct_scores(bundle: Path, tmp_path: Path) -> None:
    """Oracle: the plain model's cross-entropy, and ``score_policy`` by hand."""
    loaded = load_bundle(bundle)
    windows = torch.randint(len(ALPHABET), (2, 65), generator=torch.Generator().manual_seed(3))
    settings = BenchConfig(policies=("window",), budgets=(0.25,))
    rows = Rows(tmp_path / "bench.json", {})
    measure_quality(rows, settings, loaded, windows, None)
    full, window = rows
    logits = loaded.model(windows[:, :-1]).detach().double()
    bits = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)
    assert abs(full["bits_per_token"] - float(bits)) < FLOAT32
    (_, policy), = compared(settings, 16)  # fmt: skip
    score = score_policy(loaded.model, windows[:, :-1], policy)
    assert window["kl_vs_full"] == pytest.approx(score.kl_vs_full, rel=FLOAT32)
    assert window["tokens"] == 16
    assert window["kl_vs_full"] > 0


def test_answers_are_scored_by_the_task(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a model that answers every other question right has an accuracy of one half."""
    answers = {example.prompt: example.answer for example in TASK.examples(8)}
    asked: list[object] = []

    class HalfRight:
        def __init__(self, _bundle: object, *, kv: object, engine: object) -> None:
            asked.append(kv)

        def generate(self, prompts: list[str], params: list, **_: object) -> list:
            return [
                SimpleNamespace(
                    text=answers[p] + ";" if i % 2 else "no", kv_kept_fraction=0.5, error=None
                )
                for i, p in enumerate(prompts)
            ]

    monkeypatch.setattr(retrieval, "LLM", HalfRight)
    settings = BenchConfig(policies=("window",), budgets=(0.25, 0.5), examples=8)
    rows = Rows(tmp_path / "bench.json", {})
    retrieval.measure_tasks(rows, settings, load_bundle(bundle), TASK)
    assert [row["exact"] for row in rows] == [0.5] * 5
    assert [row.get("query") for row in rows] == [None, "known", "known", "late", "late"]
    assert [getattr(kv, "compress_prefill", None) for kv in asked] == [
        None,
        False,
        False,
        True,
        True,
    ]


def test_questions_longer_than_the_context_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Oracle: the error contract."""
    with pytest.raises(DataError, match=r"lower data\.task\.length"):
        retrieval.measure_tasks(
            Rows(tmp_path / "bench.json", {}),
            BenchConfig(),
            load_bundle(bundle),
            Recall(length=200),
        )


def test_speed_rows_state_memory_and_paired_ratios(tmp_path: Path) -> None:
    """Oracle: bytes of the cached slots by hand; the full cache is once as fast as itself."""
    shape = SpeedModel(vocab_size=30, width=16, layers=2, heads=2, kv_heads=1, mlp_width=16)
    settings = BenchConfig(
        parts=("speed",), policies=("window",), contexts=(64,), batches=(1, 2), steps=2, rounds=2,
        budgets=(0.25,), model=shape,
    )  # fmt: skip
    rows = Rows(tmp_path / "bench.json", {})
    measure_speed(rows, settings, random_model(shape, 64))
    by_key = {(row["batch"], row["policy"]): row for row in rows}
    per_slot = 2 * (2 * 8 * 4 + 4)  # layers, keys and values of width 8 in float32, a position
    for (batch, policy), row in by_key.items():
        assert row["kv_bytes"] == batch * row["cached"] * per_slot
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["cached"] <= (64 if policy == "full" else 16 + 16)
    assert by_key[1, "full"]["ratio"] == 1.0
    assert by_key[2, "full"]["cached"] > by_key[2, "window"]["cached"]
    assert random_model(shape, 64).config.context == 64


def test_every_request_decodes_in_every_timed_step(tmp_path: Path) -> None:
    """Oracle: slots of a full cache by hand, for prompts that take many steps to read."""
    shape = SpeedModel(vocab_size=30, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16)
    settings = BenchConfig(
        parts=("speed",), policies=("full",), contexts=(600,), batches=(6,), steps=1, rounds=1,
        model=shape,
    )  # fmt: skip
    rows = Rows(tmp_path / "bench.json", {})
    measure_speed(rows, settings, random_model(shape, 600))
    (row,) = rows
    # 587 prompt tokens, 512 and at most 6 a step: request r decodes from step r + 1 (of 7) on.
    assert 587 + 2 < row["cached"] <= 587 + 2 + 7


def test_command_measures_prints_and_resumes(
    lipllm: Callable, bundle: Path, tmp_path: Path
) -> None:
    """Oracle: the summary's contract; a second run makes nothing new."""
    run = f"hydra.run.dir={tmp_path / 'run'}"
    task = ("data=recall", "data.task.length=60", "data.task.needles=2", "data.max_bytes=20000")
    few = ("bench.policies=[window]", "bench.budgets=[0.25]", "bench.examples=2", "bench.windows=2")
    command = ("bench", f"bundle={bundle}", *task, *few, run, "device=cpu")
    done = lipllm(*command)
    assert done.status == 0, done.err
    assert "times full" not in done.out
    assert "exact" in done.out
    path = Path(done.out.strip().splitlines()[-1].removeprefix("summary: "))
    metrics = json.loads(path.read_text())["metrics"]
    assert all(is_declared(name) for name in metrics)
    assert metrics["bench/rows"] == 5
    before = (tmp_path / "run" / "bench.json").read_bytes()
    assert lipllm(*command).status == 0
    assert (tmp_path / "run" / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bench.parts=[quality]",), "bundle=null"),
        (("bench.parts=[beauty]",), "bench.parts"),
        (("bench.policies=[newest]",), "bench.policies"),
        (("bench.budgets=[1.5]",), "shares between 0 and 1"),
        (("bench.parts=[speed]", "bench.steps=0"), "bench.steps"),
        (("bench.parts=[speed]", "bench.contexts=[98]"), "at least 201 tokens, of which 100"),
    ],
    ids=["no bundle", "part", "policy", "budget", "steps", "context"],
)
def test_bad_settings_are_one_line(lipllm: Callable, words: tuple, message: str) -> None:
    """Oracle: the error contract: one line, exit status 2."""
    done = lipllm("bench", *words)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_empty_parts_are_refused() -> None:
    """Oracle: the error contract."""
    with pytest.raises(ConfigError, match="at least one"):
        BenchConfig(parts=())
