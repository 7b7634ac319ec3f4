"""Paired measurements: interleaved rounds, medians with quartiles, JSON rows and one table.

Seconds are processor seconds (children included): with the one thread that the tests use they are
the wall time of an idle machine, on a busy one too. A missed budget is reported, never an error.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from common.config import build
from common.models import LipschitzTransformer
from train.groups import Constraint
from train.init import initialise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "runs" / "bench"
VOCAB = 65  # characters of tiny Shakespeare, the paper's task
NOISE = 0.3  # of an initial matrix, added so that no block is the identity

_ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the sizes that decide how long the benchmarks take."""
    group = parser.getgroup("lipllm benchmarks")
    group.addoption("--rounds", type=int, default=5, help="measurements of everything")
    group.addoption("--batch", type=int, default=64, help="windows of a training step")
    group.addoption("--length", type=int, default=256, help="tokens of a window")
    group.addoption("--long", type=int, default=8192, help="context of the compressed cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark benchmarks and let them take their time."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.bench)
            item.add_marker(pytest.mark.timeout(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Repeated measurements of one thing: processor and wall seconds, in order."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def _clock() -> tuple[float, float]:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in who]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages), time.perf_counter()


def paired(variants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict:
    """Time every variant once per round, in turns and in alternating order.

    Returns:
        ``Times`` per variant; entries of the same round belong together.
    """
    times = {name: Times() for name in variants}
    names = list(variants)
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            cpu, wall = _clock()
            variants[name]()
            cpu_end, wall_end = _clock()
            if turn >= 0:
                times[name].cpu.append(cpu_end - cpu)
                times[name].wall.append(wall_end - wall)
    return times


class Bench:
    """Collects the rows of one topic.

    Args:
        topic: Name of the JSON file.
        config: The command line's sizes.
    """

    def __init__(self, topic: str, config: pytest.Config) -> None:
        self.topic = topic
        self.rounds, self.batch = config.getoption("rounds"), config.getoption("batch")
        self.length, self.long = config.getoption("length"), config.getoption("long")
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        values: list[float],
        unit: str,
        *,
        most: float | None = None,
        least: float | None = None,
        **settings: Any,
    ) -> None:
        """Add a row: the median of ``values``, its quartiles, and whether it meets its budget.

        Args:
            name: What was measured.
            values: One per round.
            unit: Of the values.
            most: Budget that the median may not exceed.
            least: Budget that the median must reach.
            **settings: Sizes and further figures of the measurement.
        """
        median = statistics.median(values)
        spread = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else []
        row: dict[str, Any] = {"name": name, "value": median, "unit": unit, "runs": len(values)}
        row |= {"median": median, "quartiles": [spread[0], spread[2]] if spread else None}
        if most is not None or least is not None:
            met = median <= most if most is not None else median >= (least or 0.0)
            row |= {"budget": most if most is not None else least, "met": met}
            row["budget_is"] = "most" if most is not None else "least"
        row |= {"settings": settings, **_machine()}
        self.rows.append(row)

    def write(self) -> None:
        """Write ``runs/bench/<topic>.json``."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.rows, indent=1, sort_keys=True)
        (RESULTS / f"{self.topic}.json").write_text(text + "\n", encoding="ascii")


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or None,
    }


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Return the collector of a file's rows; they are written and shown at the end."""
    collected = Bench(request.path.stem.removeprefix("bench_"), request.config)
    yield collected
    if collected.rows:
        collected.write()
        request.config.stash.setdefault(_ROWS, []).extend(collected.rows)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.write_sep("=", "benchmarks (median, quartiles, budget)")
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        low, high = row["quartiles"] or (row["value"], row["value"])
        line = f"{row['name']:<{width}} {row['value']:>10.4g} {row['unit']:<8}"
        line += f" [{low:.4g}, {high:.4g}] x{row['runs']}"
        if "met" in row:
            bound = {"most": "<=", "least": ">="}[row["budget_is"]]
            line += f"  budget {bound} {row['budget']:g}: {'met' if row['met'] else 'MISSED'}"
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{rows[0]['cpu']}, {rows[0]['threads']} thread(s): {RESULTS}")


@pytest.fixture(scope="session")
def timed() -> Callable[..., dict]:
    """Return ``paired``."""
    return paired


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LipschitzTransformer]:
    """Return ``(name of conf/model, **changes) -> model`` with capped, nowhere zero weights."""

    def make(name: str = "paper", **changes: Any) -> LipschitzTransformer:
        node = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
        model = LipschitzTransformer(build(node, **({"vocab_size": VOCAB} | changes)))
        initialise(model, Constraint(), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                std = NOISE * parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
        return model

    return make
