"""Shared fixtures: one thread, no network, no writes outside ``tmp_path``, commands in process."""

import json
import logging
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# Before anything imports these libraries.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
os.environ.update(WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")

torch.set_num_threads(1)

_FIRST, _LAST = "test_smoke.py", "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the smoke test first and whole commands last."""
    items.sort(key=lambda item: (item.path.name != _FIRST, _LAST in item.path.parts))


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        is_local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        if not is_local:
            raise PermissionError(f"tests have no network; tried {address}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _own_folder_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test in its own folder and from the same random state."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a 64 KiB text file with learnable structure: sums of small numbers, spelt out."""
    generator = random.Random(0)
    lines: list[str] = []
    while sum(map(len, lines)) < 65536:
        a, b = generator.randrange(100), generator.randrange(100)
        lines.append(f"def add_{a}_{b}():\n    return {a} + {b}  # {a + b}\n\n")
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text("".join(lines), encoding="ascii")
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Completed:
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str

    @property
    def directory(self) -> Path:
        """Folder of the run, which the last line of the output names."""
        return Path(self.out.strip().splitlines()[-1].removeprefix("summary: ")).parent

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the run's summary."""
        return dict(json.loads((self.directory / "summary.json").read_text())["metrics"])


@pytest.fixture
def lipllm(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Completed]]:
    """Return a function that runs ``lipllm ARGS...`` in this process."""
    from common.cli import COMMAND_VARIABLE, main

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for name in (COMMAND_VARIABLE, "HYDRA_FULL_ERROR", "LIPLLM_RESUMED", "LIPLLM_TRACE"):
        monkeypatch.setenv(name, "")

    def command(*arguments: str) -> Completed:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Completed(status=status, out=captured.out, err=captured.err)

    yield command
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
