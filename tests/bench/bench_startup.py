"""How long a command takes before it does anything: fresh interpreters, files in the page cache."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELP = 0.5
MOST_ROUNDS = 3  # seconds each
MODULES = ("torch", "common.report", "solvers.app", "compress.app", "serve.app", "train.app")


def _run(*arguments: str) -> Callable[[], Any]:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def test_help(bench: Any, timed: Callable) -> None:
    """``lipllm --help`` answers at once."""
    variants = {"lipllm --help": _run("-m", "common.cli", "--help"), "python": _run("-c", "pass")}
    for name, times in timed(variants, bench.rounds).items():
        budget = {"most": HELP} if name.startswith("lipllm") else {}
        bench.add(f"start: {name}", times.cpu, "s", **budget)


@pytest.mark.parametrize("module", MODULES)
def test_import(bench: Any, timed: Callable, module: str) -> None:
    """What each command imports before it starts."""
    times = timed({module: _run("-c", f"import {module}")}, min(bench.rounds, MOST_ROUNDS))
    bench.add(f"start: import {module}", times[module].cpu, "s")
