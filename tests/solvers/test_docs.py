"""The guide to the solvers: its examples run, and its tables name what exists."""

import re
from pathlib import Path

import pytest

from solvers import SOLVERS
from solvers.library import PROBLEMS

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "solvers.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run_on_their_own(example, capsys):
    """Oracle: the interpreter; each example says something, and nothing that failed."""
    exec(compile(example, "docs/solvers.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip()
    assert "limit was reached" not in printed


@pytest.mark.parametrize("name", [*SOLVERS, *PROBLEMS])
def test_every_method_and_problem_is_in_the_guide(name):
    """Oracle: the registries."""
    assert f"`{name}`" in GUIDE


def test_sweep_commands_name_known_methods_and_problems():
    """Oracle: the registries."""
    for kind, known in (("problem", PROBLEMS), ("method", {"auto": None} | SOLVERS)):
        for values in re.findall(rf"lipllm solve [^`\n]*\b{kind}=(\S+)", GUIDE):
            assert set(values.split(",")) <= set(known)
