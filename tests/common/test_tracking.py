"""Tracking: declared names, a metrics file that survives interruption, offline W&B."""

import ast
import errno
import re
import sys
from pathlib import Path

import pytest

from common.config import build
from common.dashboard import DASHBOARD, build_workspace
from common.errors import BackendError, ConfigError
from common.ledger import Run
from common.metric_names import FAMILIES, METRICS
from common.metrics_file import read_metrics
from common.metrics_logger import MetricsLogger
from common.tracking import LoggerConfig, build_loggers, describe, is_declared, record

ROOT = Path(__file__).resolve().parents[2]

# The interface of design.md 2.3: programs outside this repository read these names.
PROMISED = """data/unigram_entropy_bits train/val_bits_per_byte train/val_acc_full train/val_acc_ref
train/tokens_per_s cert/reference cert/naive cert/tightened cert/attack compress/removed_fraction
compress/val_bits_per_byte compress/measured_deviation compress/certified_deviation
serve/kv_kept_fraction serve/kl_vs_full serve/measured_deviation serve/certified_deviation
serve/tokens_per_s compress/cert/tightened train/norm/layers.0.mlp.up""".split()  # noqa: SIM905


@pytest.fixture
def run(tmp_path):
    """Return a run in its own folder."""
    directory = tmp_path / "sweeps" / "today" / "seed=1"
    directory.mkdir(parents=True)
    return Run(command="train", directory=directory, config={"name": None}, config_hash="ab")


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_declared(name):
    """Oracle: the published list."""
    assert is_declared(name)
    assert describe(name)


@pytest.mark.parametrize("name", ["train/los", "train/norm/", "compress/cert/nonsense", "loss"])
def test_other_names_are_not_declared(name):
    """Oracle: by hand; a family's prefix alone is no name."""
    assert not is_declared(name)


def test_declarations_are_well_formed():
    """Oracle: ``group/name`` in lower case, one line each; estimates are never called bounds."""
    for name, text in METRICS.items():
        assert re.fullmatch(r"[a-z]+/[a-z0-9_]+", name)
        assert text
        assert "\n" not in text
        if "estimate" in text:
            assert "bound" not in re.split("[/_]", name)
    assert all(prefix.endswith("/") for prefix in FAMILIES)


def test_declared_names_are_written_somewhere():
    """Oracle: the strings in the sources, f-strings as patterns below their literal group."""
    texts, patterns = set(), []
    for package in ("common", "solvers", "train", "compress", "serve"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name in ("metric_names.py", "dashboard.py") or path.parent.name == "reporting":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else None for v in node.values]
                    if re.match(r"[a-z]+/", str(parts[0])):
                        patterns.append("".join(".+" if p is None else re.escape(p) for p in parts))
    names = [*METRICS, *(f"{prefix}x" for prefix in FAMILIES)]
    written = [any(re.fullmatch(pattern, name) for pattern in patterns) for name in names]
    assert [n for n, w in zip(names, written, strict=True) if not w and n not in texts] == []


def test_dashboard_names_are_declared():
    """Oracle: every metric of every panel, and a family by its prefix."""
    names = [metric for part in DASHBOARD for panel in part.panels for metric in panel.metrics]
    assert len(names) > 10
    for name in names:
        assert name in FAMILIES if name.endswith("/") else is_declared(name)


def test_metrics_file_joins_values_of_a_step(tmp_path):
    """Oracle: what was logged, one row per step, new columns at any time."""
    logger = MetricsLogger(tmp_path)
    logger.log_metrics({"train/loss": 3.0, "epoch": 0}, step=1)
    logger.log_metrics({"train/loss": 2.0}, step=2)
    logger.log_metrics({"train/val_loss_nats": 2.5}, step=1)
    logger.log_metrics({"train/loss": float("inf")})
    logger.finalize("success")
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "train/loss": 3.0, "train/val_loss_nats": 2.5},
        {"step": 2, "train/loss": 2.0},
        {"step": 3, "train/loss": float("inf")},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_first_values_are_on_the_disk_at_once(tmp_path):
    """Oracle: a killed run leaves a readable file."""
    MetricsLogger(tmp_path).log_metrics({"train/loss": 3.0}, step=1)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "train/loss": 3.0}]


def test_full_disk_keeps_the_metrics_file_and_nothing_else(tmp_path, monkeypatch):
    """Oracle: the file as it was before a write that fails when it is flushed."""
    logger = MetricsLogger(tmp_path)
    logger.log_metrics({"train/loss": 3.0}, step=1)
    before = (tmp_path / "metrics.csv").read_bytes()

    def no_space(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    logger.log_metrics({"train/loss": 2.0}, step=2)
    with pytest.raises(OSError, match="No space"):
        logger.finalize("success")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


def test_resumed_run_continues_its_file(run):
    """Oracle: the rows of an uninterrupted run; steps after the checkpoint are not doubled."""
    config = LoggerConfig()
    (first,) = build_loggers(config, run.directory, run)
    for step in range(1, 8):
        first.log_metrics({"train/loss": 1.0 / step}, step=step)
    first.save()
    run.resumed = True
    (second,) = build_loggers(config, run.directory, run)
    for step in range(5, 11):
        second.log_metrics({"train/loss": 1.0 / step}, step=step)
    second.finalize("success")
    rows = read_metrics(run.directory / "metrics.csv")
    assert rows == [{"step": step, "train/loss": 1.0 / step} for step in range(1, 11)]
    run.resumed = False
    (third,) = build_loggers(config, run.directory, run)
    third.log_metrics({"train/loss": 9.0}, step=1)
    assert read_metrics(run.directory / "metrics.csv") == [{"step": 1, "train/loss": 9.0}]


def test_damaged_rows_are_left_out(tmp_path):
    """Oracle: a file cut in the middle of a row still gives its whole rows."""
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.5\n2,oops\n,3\n3,1.5\n4")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows == [{"step": 1, "train/loss": 2.5}, {"step": 3, "train/loss": 1.5}, {"step": 4}]
    assert read_metrics(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"kinds": ["disk"]}, "csv, wandb"), ({"mode": "maybe"}, "mode"), ({"kinds": 3}, "kinds")],
)
def test_impossible_settings(settings, expected):
    """Oracle: the message names the field and the options."""
    with pytest.raises(ConfigError, match=expected):
        LoggerConfig(**settings)


def test_config_node_builds():
    """Oracle: lists of the YAML arrive as the dataclass wants them."""
    node = {"_target_": "common.tracking.LoggerConfig", "kinds": ["csv", "wandb"], "tags": ["a"]}
    assert build(node) == LoggerConfig(kinds=("csv", "wandb"), tags=("a",))
    assert build_loggers(LoggerConfig(kinds=()), None, None) == []


def test_online_asks_for_wandb():
    """Oracle: the setting alone must not be without effect."""
    assert LoggerConfig(mode="online").kinds == ("csv", "wandb")


def test_recorded_rows_reach_the_file_and_wandb(run, monkeypatch):
    """Oracle: the rows; W&B gets the step that its charts use."""
    import wandb

    logged = []

    class Started:
        log = staticmethod(logged.append)

        def define_metric(self, *args, **kwargs):
            pass

    monkeypatch.setattr(wandb, "init", lambda **settings: Started())
    config = LoggerConfig(kinds=("csv", "wandb"))
    record(config, run, {0: {"solve/evals": 1.0}, 5: {"solve/evals": 6.0}})
    rows = read_metrics(run.directory / "metrics.csv")
    assert rows == [{"step": 0, "solve/evals": 1.0}, {"step": 5, "solve/evals": 6.0}]
    assert logged == [
        {"trainer/global_step": 0, "solve/evals": 1.0},
        {"trainer/global_step": 5, "solve/evals": 6.0},
    ]


def test_missing_wandb_names_the_remedy(run, monkeypatch):
    """Oracle: a blocked import."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BackendError, match=r"pip install wandb.*logger=csv"):
        build_loggers(LoggerConfig(kinds=("wandb",)), run.directory, run)


def test_wandb_settings(run, monkeypatch):
    """Oracle: what W&B is started with: offline, inside the run directory, grouped by sweep."""
    import wandb

    calls = []

    class Started:
        def define_metric(self, *args, **kwargs):
            calls.append(args)

    def init(**settings):
        calls.append(settings)
        return Started()

    monkeypatch.setattr(wandb, "init", init)
    build_loggers(LoggerConfig(kinds=("wandb",)), run.directory, run)
    settings = calls[0]
    assert settings["mode"] == "offline"
    assert settings["dir"] == run.directory
    assert settings["group"] == "today"
    assert settings["job_type"] == "train"
    assert settings["resume"] is None
    assert ("*",) in calls

    def refused(**settings):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ConfigError, match=r"No API key configured.*wandb login") as caught:
        build_loggers(LoggerConfig(kinds=("wandb",), mode="online"), run.directory, run)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_wandb_offline_writes_below_the_run(run, monkeypatch):
    """Oracle: a run file in the run directory, no network (the guard would raise), no output."""
    import wandb

    monkeypatch.setenv("HOME", str(run.directory.parent))
    (logger,) = build_loggers(LoggerConfig(kinds=("wandb",)), run.directory, run)
    try:
        logger.log_metrics({"train/loss": 1.0}, step=1)
    finally:
        wandb.finish()
    (file,) = run.directory.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 0


def test_workspace_builds_offline():
    """Oracle: one section per section of the specification; nothing is sent."""
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("someone", "lipllm")
    assert [part.name for part in workspace.sections] == [part.title for part in DASHBOARD]
    assert [len(part.panels) for part in workspace.sections] == [len(p.panels) for p in DASHBOARD]


def test_missing_workspace_package_names_the_remedy(monkeypatch):
    """Oracle: a blocked import."""
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(BackendError, match=r"lipllm\[dashboards\]"):
        build_workspace("someone", "lipllm")
