"""The dispatcher: what it imports, how it finds the command, how errors look."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common import cli
from common.cli import COMMANDS
from common.errors import BundleError

HEAVY = ("torch", "numpy", "hydra", "lightning", "rich")


def _one_line(text: str) -> str:
    assert text.count("\n") == 1
    assert text.startswith("lipllm: error: ")
    return text


def _install(monkeypatch: pytest.MonkeyPatch, function: Callable[[], int | None]) -> None:
    """Make ``lipllm doctor`` run ``function``."""
    module: Any = ModuleType("fake_command")
    module.main = function
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(COMMANDS, "doctor", ("fake_command:main", ""))


def test_help_imports_nothing_heavy() -> None:
    """Oracle: the module table of a fresh interpreter after ``lipllm --help``."""
    program = (
        "import sys\nfrom common.cli import main\nassert main(['--help']) == 0\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["seed=1"], ["-m"]])
def test_without_a_command_the_status_is_2(lipllm: Callable[..., Any], arguments: list) -> None:
    """Oracle: the convention for usage errors."""
    assert lipllm(*arguments).status == 2


def test_unknown_command_is_one_line_with_a_guess(lipllm: Callable[..., Any]) -> None:
    """Oracle: the nearest command by hand."""
    assert "did you mean train?" in _one_line(lipllm("trian", "seed=1").err)


def test_version_is_printed(lipllm: Callable[..., Any]) -> None:
    """Oracle: the distribution's metadata."""
    assert lipllm("--version").out.startswith("lipllm 0.")


def test_rank_process_finds_the_command(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what Lightning starts: the same arguments without the command word."""
    seen: list[list[str]] = []
    _install(monkeypatch, lambda: seen.append(list(sys.argv[1:])))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(cli.COMMAND_VARIABLE, "doctor")
    assert lipllm("seed=5", "hydra.run.dir=x").status == 0
    assert seen == [["seed=5", "hydra.run.dir=x"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a=1", "-m", "b=2"], ["a=1", "b=2", "-m"]),
        (["--cfg", "job", "a=1"], ["a=1", "--cfg", "job"]),
        (["--info", "a=1"], ["a=1", "--info"]),
        (["--config-dir=d", "~a", "+b=-1"], ["~a", "+b=-1", "--config-dir=d"]),
    ],
)
def test_options_may_stand_anywhere(
    lipllm: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    expected: list[str],
) -> None:
    """Oracle: by hand; Hydra's parser refuses options between overrides."""
    seen: list[list[str]] = []
    _install(monkeypatch, lambda: seen.append(list(sys.argv[1:])))
    assert lipllm("doctor", *given).status == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("lipllm tr", "train"), ("lipllm c", "certify campaign compress calibrate")],
)
def test_completion_offers_commands(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    """Oracle: the command table."""
    monkeypatch.setenv("COMP_LINE", line)
    done = lipllm("-sc", "query=bash")
    assert (done.status, done.out.split()) == (0, expected.split())


def test_completion_hands_the_rest_to_hydra(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the line without its command word."""
    seen: list[str] = []
    _install(monkeypatch, lambda: seen.append(cli.os.environ["COMP_LINE"]))
    monkeypatch.setenv("COMP_LINE", "lipllm doctor see")
    lipllm("-sc", "query=bash")
    assert seen == ["lipllm see"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BundleError("model.safetensors:\n  truncated"), "model.safetensors: truncated"),
        (OSError(errno.ENOSPC, "No space left on device", "b/x"), "b/x: the disk is full"),
        (
            OSError(errno.ENOSPC, "No space left on device", "tmp", None, "b/x"),
            "b/x: the disk is full",
        ),
        (PermissionError(errno.EACCES, "denied", "b"), "b: permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "not a directory", "f/g"), "f/g: a part of the path"),
        (RuntimeError("Error while serializing: No space left on device"), "the disk is full"),
        (MemoryError(), "out of memory"),
    ],
)
def test_user_errors_are_one_line(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    """Oracle: status 2, one line, no traceback."""

    def fail() -> None:
        raise error

    _install(monkeypatch, fail)
    done = lipllm("doctor")
    assert done.status == 2
    assert text in _one_line(done.err)


def test_defects_keep_their_traceback(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: status 1 and the raising line."""
    _install(monkeypatch, lambda: [][1])
    done = lipllm("doctor")
    assert done.status == 1
    assert "IndexError" in done.err
    assert "Traceback" in done.err


def test_trace_variable_shows_tracebacks_of_user_errors(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: both the traceback and, last, the line."""

    def fail() -> None:
        raise BundleError("no bundle")

    _install(monkeypatch, fail)
    monkeypatch.setenv(cli.TRACE_VARIABLE, "1")
    lines = lipllm("doctor").err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "lipllm: error: no bundle"


def test_interrupt_is_one_line_and_130(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the shell's convention for SIGINT."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    _install(monkeypatch, interrupt)
    done = lipllm("doctor")
    assert (done.status, done.err.count("\n")) == (130, 1)


def test_shadowed_package_is_named(
    lipllm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Oracle: a foreign package of the same name, earlier on the path."""
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve/__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "serve"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    done = lipllm("doctor")
    assert done.status == 2
    assert str(tmp_path) in _one_line(done.err)


@pytest.mark.parametrize(("shell", "statuses"), [("{} >&-", "0"), ("{} | head -c 0", "141 0")])
def test_output_that_nobody_reads_is_no_traceback(
    tmp_path: Path, shell: str, statuses: str
) -> None:
    """Oracle: bash; logged lines and the summary both meet a closed or broken standard output."""
    program = (
        "import logging, sys, time, types\nfrom common import cli\nfrom common.runs import *\n"
        "def body(cfg, run):\n    time.sleep(0.2)\n    logging.getLogger('a').info('b')\n"
        "    return Outcome()\n"
        "sys.modules['fake'] = types.SimpleNamespace(main=hydra_command('doctor', body))\n"
        "cli.COMMANDS['doctor'] = ('fake:main', '')\nsys.exit(cli.main(['doctor']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    line = shell.format(f"{sys.executable} program.py") + '; echo "${PIPESTATUS[@]}" >&2'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.split() == statuses.split()
