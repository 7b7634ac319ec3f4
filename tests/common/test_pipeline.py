"""The stage runner, on stages that only count and write small files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import OmegaConf

from common import ledger
from common.errors import ConfigError, DataError
from common.ledger import Outcome, Run, perform, read_json, write_json
from common.pipeline import Stage, dependencies, pipeline, read_stages

STAGES = [
    {"name": "make", "target": "fake_stages:make", "keys": ["a"], "artifacts": {"bundle": "first"}},
    {"name": "extend", "target": "fake_stages:extend", "keys": ["b"], "bundle": "make"},
    {
        "name": "shrink",
        "target": "fake_stages:make",
        "keys": ["c"],
        "bundle": "make",
        "prefix": "small/",
        "artifacts": {"bundle": "last"},
    },
    {"name": "show", "target": "fake_stages:show", "keys": []},
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Install the stage module; return the list of (stage, resumed) that were run."""
    made: list[tuple[str, bool]] = []
    module = ModuleType("fake_stages")

    def make(cfg: Any, run: Run) -> Outcome:
        made.append((run.command, run.resumed))
        bundle = run.directory / "bundle"
        bundle.mkdir(exist_ok=True)
        write_json(bundle / "manifest.json", {"fingerprint": str(cfg.get("a"))})
        return Outcome(metrics={"n": float(cfg.seed)}, artifacts={"bundle": bundle})

    def extend(cfg: Any, run: Run) -> Outcome:
        made.append((run.command, run.resumed))
        (Path(cfg.bundle) / "proof.json").write_text(str(cfg.b))
        if cfg.b == "bad":
            raise DataError("b=bad: expected good; correct it")
        if cfg.b == "stop":
            raise KeyboardInterrupt
        return Outcome()

    def show(cfg: Any, run: Run) -> Outcome:
        made.append((run.command, run.resumed))
        return Outcome()

    for function in (make, extend, show):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "fake_stages", module)
    monkeypatch.setattr(ledger, "_checked_metrics", dict)
    return made


@pytest.fixture
def start(tmp_path: Path, calls: list[tuple[str, bool]]) -> Callable[..., tuple[dict, list]]:
    """Return a function that runs the pipeline and gives its summary and the stages that ran."""

    def go(**changes: Any) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
        values = {"a": 1, "b": 2, "c": 3, "seed": 0, "device": "cpu", "force": False} | changes
        config = {**values, "pipeline": {"stages": STAGES}}
        run = Run(command="pipeline", directory=tmp_path, config=config, config_hash="0")
        calls.clear()
        finished = perform(run, pipeline, OmegaConf.create(config), shared=True)
        return finished.summary, list(calls)

    return go


def test_summary_merges_metrics_and_artifacts(start: Callable[..., Any], tmp_path: Path) -> None:
    """Oracle: the stage list above, by hand."""
    summary, ran = start(seed=4)
    assert ran == [("make", False), ("extend", False), ("shrink", False), ("show", False)]
    assert summary["metrics"] == {"n": 4.0, "small/n": 4.0}
    assert summary["artifacts"] == {"first": "make/bundle", "last": "shrink/bundle"}
    assert json.loads((tmp_path / "shrink/summary.json").read_text())["command"] == "shrink"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"a": 9}, ["make", "extend", "shrink", "show"]),
        ({"b": 9}, ["extend", "shrink", "show"]),
        ({"c": 9}, ["shrink", "show"]),
        ({"force": True}, ["make", "extend", "shrink", "show"]),
        ({"seed": 1}, ["make", "extend", "shrink", "show"]),
    ],
)
def test_second_run_does_what_is_left(
    start: Callable[..., Any], changes: dict[str, Any], expected: list[str]
) -> None:
    """Oracle: which stages read the changed key, and which read what those write."""
    first, _ = start()
    summary, ran = start(**changes)
    assert ran == [(name, False) for name in expected]
    assert set(summary["metrics"]) == set(first["metrics"])


def test_replaced_model_is_noticed(start: Callable[..., Any], tmp_path: Path) -> None:
    """Oracle: the stages that read the model whose recorded hash was changed."""
    start()
    write_json(tmp_path / "make/bundle/manifest.json", {"fingerprint": "other"})
    assert [name for name, _ in start()[1]] == ["extend", "shrink", "show"]


def test_lost_artifact_is_made_again(start: Callable[..., Any], tmp_path: Path) -> None:
    """Oracle: a finished stage whose artifact was deleted is not finished."""
    start()
    (tmp_path / "shrink/bundle").rename(tmp_path / "elsewhere")
    assert start()[1] == [("shrink", True)]


def test_replaced_results_are_kept(start: Callable[..., Any], tmp_path: Path) -> None:
    """Oracle: the first run's summary is found in the attic."""
    start()
    before = read_json(tmp_path / "make/summary.json")
    start(a=9)
    attic = list((tmp_path / ".old").glob("make-*/summary.json"))
    assert [read_json(path) for path in attic] == [before]


@pytest.mark.parametrize(("value", "error"), [("bad", DataError), ("stop", KeyboardInterrupt)])
def test_stopped_pipeline_resumes(
    start: Callable[..., Any],
    calls: list[tuple[str, bool]],
    tmp_path: Path,
    value: str,
    error: type[BaseException],
) -> None:
    """Oracle: no summaries of what stopped; then the stage before is skipped, this one resumed."""
    with pytest.raises(error):
        start(b=value)
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "extend/summary.json").exists()
    with pytest.raises(error):
        start(b=value)
    assert calls == [("extend", True)]
    assert start(b="good")[1] == [("extend", False), ("shrink", False), ("show", False)]


def test_dependencies_follow_the_bundle() -> None:
    """Oracle: by hand; a stage without a bundle reads everything before it."""
    stages = read_stages(STAGES)
    found = [dependencies(stages, index) for index in range(len(stages))]
    assert found == [[], ["make"], ["make", "extend"], ["make", "extend", "shrink"]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "make"}, "used twice"),
        ({"bundle": "later"}, "expected an earlier stage"),
        ({"keys": "a"}, "keys"),
        ({"colour": 1}, "colour"),
    ],
)
def test_malformed_stage_is_refused(change: dict[str, Any], text: str) -> None:
    """Oracle: the message names what is wrong."""
    node = {"name": "x", "target": "m:f", "keys": []} | change
    with pytest.raises(ConfigError, match=text):
        read_stages([STAGES[0], node])


@pytest.mark.parametrize("nodes", [None, 3, "make", {"name": "make"}, [3]])
def test_anything_but_a_list_of_stages_is_refused(nodes: Any) -> None:
    """Oracle: the message names the key."""
    with pytest.raises(ConfigError, match=r"pipeline\.stages="):
        read_stages(nodes)


@pytest.mark.parametrize("target", ["nowhere:f", "json:nothing", "json"])
def test_unknown_target_is_refused(target: str) -> None:
    """Oracle: one error type for a missing module and for a missing function."""
    with pytest.raises(ConfigError, match="expected module:function"):
        Stage(name="x", target=target, keys=()).body()


@pytest.mark.parametrize("name", ["../..", "/tmp/elsewhere", "a/../../b", ".", "", "null"])
def test_a_name_never_leads_out_of_the_folder(
    lipllm: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Oracle: status 2, one line that names the value, nothing written."""
    done = lipllm("pipeline", f"name={name}")
    assert done.status == 2
    start = f"lipllm: error: name={'None' if name == 'null' else name}: expected a folder's name"
    assert done.err.startswith(start)
    assert len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_refused_pipeline_leaves_nothing(lipllm: Callable[..., Any], tmp_path: Path) -> None:
    """Oracle: an empty folder; no directory named by the time, as other commands have."""
    done = lipllm("pipeline", "pipeline.stages=[]", "seed=-1")
    assert done.status == 2
    assert [
        path.name for path in tmp_path.rglob("*") if path.name not in ("runs", "pipeline")
    ] == []


@pytest.mark.parametrize(
    ("key", "target"),
    [("data", "common.images.ImageConfig"), ("model", "common.models.MLPConfig")],
)
def test_image_classifiers_are_refused_before_the_first_stage(
    start: Callable[..., Any], calls: list[tuple[str, bool]], key: str, target: str
) -> None:
    """One line with the remedy, and no stage has run."""
    with pytest.raises(ConfigError, match=r"expects text.*one by one"):
        start(**{key: {"_target_": target}})
    assert calls == []
