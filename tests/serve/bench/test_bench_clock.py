"""Clocks, pairing and the models that are timed: what a speed row means."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigError, DataError
from serve.bench import baseline, clock
from serve.bench.clock import Clock
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig, SpeedModel, overlap
from serve.bench.speed import interleaved, measure_speed, paired, random_model, succeeded

SHAPE = SpeedModel(vocab_size=30, width=16, layers=2, heads=2, kv_heads=1, mlp_width=16)


@pytest.mark.parametrize(
    ("device", "threads", "kind"),
    [("cpu", 1, "processor"), ("cpu", 2, "wall"), ("cuda", 1, "wall")],
)
def test_clock_fits_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, threads: int, kind: str
) -> None:
    """Oracle: processor seconds are those of one thread; a GPU is waited for."""
    waited: list[torch.device] = []
    monkeypatch.setattr(clock.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(clock.torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(clock.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(
        clock, "time", SimpleNamespace(process_time=lambda: 1.0, perf_counter=lambda: 2.0)
    )
    chosen = Clock.of(device)
    assert chosen.kind == chosen.keys["clock"] == kind
    assert chosen() == (1.0 if kind == "processor" else 2.0)
    assert waited == ([torch.device("cuda")] if device == "cuda" else [])
    names = {("cpu", 1): "cpu, 1 thread", ("cpu", 2): "cpu, 2 threads"}
    assert chosen.keys["device"] == names.get((device, threads), "a GPU")


def test_rounds_alternate_and_ratios_are_paired() -> None:
    """Oracle: a clock that counts its calls, and ratios by hand."""
    order: list[str] = []
    jobs = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = interleaved(jobs, 2, itertools.count().__next__)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [1, 1], "b": [1, 1]}
    assert paired([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]) == {
        "ratio": 1.0, "ratio_low": 0.5, "ratio_high": 2.0
    }  # fmt: skip


def test_another_clock_makes_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: figures of two clocks stand side by side; the same clock measures nothing new."""
    settings = BenchConfig(
        parts=("speed",), policies=("window",), contexts=(64,), batches=(1,), steps=1, rounds=1,
        budgets=(0.25,), summaries=(0, 1), model=SHAPE,
    )  # fmt: skip
    rows, model = Rows(tmp_path / "bench.json", {}), random_model(SHAPE, 64)
    for kind in ("processor", "wall", "processor"):
        chosen = Clock(kind, torch.device("cpu"))
        monkeypatch.setattr(Clock, "of", lambda _, chosen=chosen: chosen)
        measure_speed(rows, settings, model)
    assert [row["clock"] for row in rows] == ["processor"] * 3 + ["wall"] * 3
    assert [row.get("summary_tokens") for row in rows] == [None, 0, 1] * 2


def test_contexts_are_the_models_own_unless_asked_for() -> None:
    """Oracle: the documented default, and the error contract."""
    few = BenchConfig(parts=("speed",), batches=(1,), steps=4, rounds=1)
    assert few.shapes() == [(1024, 1), (8192, 1)]
    assert few.shapes(256) == [(256, 1)]
    assert few.shapes(4096) == [(1024, 1), (4096, 1)]
    assert BenchConfig().shapes(16) == []
    asked = BenchConfig(parts=("speed",), batches=(1,), steps=4, rounds=1, contexts=(512,))
    with pytest.raises(ConfigError, match="context of 256"):
        asked.shapes(256)
    decoded = 4 * 2 + 2 + overlap(16, 1)
    with pytest.raises(ConfigError, match=f"at least {2 * decoded + 1} tokens, of which {decoded}"):
        few.shapes(16)


def test_baseline_gives_prompts_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the device of what the other library is given, for a model that is not on the CPU."""
    seen: list[torch.Tensor] = []
    other = SimpleNamespace(generate=lambda prompts_BT, **_: seen.append(prompts_BT))
    engine = SimpleNamespace(add=lambda *_: None, has_work=False)
    monkeypatch.setattr(baseline, "_counterpart", lambda _: other)
    monkeypatch.setattr(baseline, "EngineCore", lambda *_: engine)
    decoder: Any = SimpleNamespace(vocab_size=7, device=torch.device("meta"))
    ticks: Any = itertools.count().__next__
    row = baseline._race(decoder, rounds=1, batch=2, clock=ticks)
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1.0
    assert [(x.device.type, tuple(x.shape)) for x in seen] == [("meta", (2, baseline.PROMPT))] * 2
    with pytest.raises(ConfigError, match="context of 128 tokens"):
        baseline.require_context(127)


def test_failed_requests_are_no_fast_ones() -> None:
    """Oracle: the engine ends requests of a failing step; that is an error, not a speed."""
    fine = SimpleNamespace(error=None)
    assert succeeded([fine]) == [fine]
    with pytest.raises(DataError, match="out of memory"):
        succeeded([fine, SimpleNamespace(error="out of memory")])
