"""The induction task: a piece that comes again goes on as before."""

import pytest

from common.errors import ConfigError
from common.tasks import Induction

SMALL = Induction(length=30, piece=5, cue=2, symbols=8, seed=1)
TASK = pytest.mark.parametrize("task", [Induction(), SMALL], ids=["default", "small"])


def solve(prompt: str, cue: int, rest: int) -> list[str]:
    """Return what followed each earlier occurrence of the prompt's last ``cue`` symbols."""
    last = len(prompt) - cue
    starts = [i for i in range(last) if prompt[i : i + cue] == prompt[last:]]
    return [prompt[i + cue : i + cue + rest] for i in starts]


@TASK
def test_prompt_determines_the_answer(task: Induction) -> None:
    """Oracle: a loop over all positions finds one earlier cue, and the answer after it."""
    for example in task.examples(150):
        assert len(example.prompt) == task.length
        assert len(example.answer) == task.piece - task.cue
        assert solve(example.prompt, task.cue, len(example.answer)) == [example.answer]
        ((first, last),) = example.needles
        assert example.prompt[first:last] == example.prompt[-task.cue :] + example.answer


def test_cues_reach_back_over_the_whole_prompt() -> None:
    """Oracle: starts are uniform; quartiles within 0.05."""
    found = sorted(example.facts["position"] for example in Induction(length=240).examples(800))
    for quarter in (1, 2, 3):
        assert found[200 * quarter] == pytest.approx(0.25 * quarter, abs=0.05)


def repeated(text: str, piece: int) -> set[int]:
    """Return the places of a text that lie in a piece which stands there earlier as well."""
    starts = [i for i in range(len(text) - piece + 1) if text.find(text[i : i + piece]) < i]
    return {i + j for i in starts for j in range(piece)}


@pytest.mark.parametrize("repeats", [0.0, 0.5, 1.0])
def test_documents_repeat_the_wanted_share(repeats: float) -> None:
    """Oracle: symbols in pieces that stood earlier, counted; the first piece never did."""
    task = Induction(repeats=repeats, length=400)
    seen = total = 0
    for index in range(60):
        text = task.document(index).removesuffix(task.end)
        assert len(text) == task.length
        # A piece that the document's end cuts off is none.
        seen += len(repeated(text, task.piece))
        total += len(text) - task.piece
    assert seen / total == pytest.approx(repeats, abs=0.04)


def test_repeats_may_begin_anywhere() -> None:
    """Oracle: distances to the earlier piece have all remainders and reach over the whole text."""
    task, distances = Induction(), set()
    for index in range(60):
        text = task.document(index)
        for i in repeated(text, task.piece):
            piece = text[i : i + task.piece]
            distances |= {i - text.find(piece)} if len(piece) == task.piece else set()
    assert {distance % task.piece for distance in distances} == set(range(task.piece))
    assert max(distances) > 0.75 * task.length


def test_only_as_many_symbols_as_the_answer_are_read() -> None:
    """Oracle: by hand; the sequence may go on, but must not stop early."""
    task = Induction(length=30, piece=5, cue=2)
    example = task.example(0)
    a, b, c = example.answer
    assert task.score(example, example.answer + "xyz") == {"exact": 1.0, "symbols": 1.0}
    assert task.score(example, a + b) == {"exact": 0.0, "symbols": 2 / 3}
    assert task.score(example, a + b + "\n" + c) == {"exact": 0.0, "symbols": 2 / 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"piece": 3}, "task.piece=3: expected more than task.cue=3"),
        ({"length": 10}, "task.length=10: expected at least piece . cue = 11"),
        ({"symbols": 2}, "task.cue=3: 2 symbols have fewer cues than task.length=60"),
        ({"symbols": 27}, "task.symbols=27"),
        ({"repeats": 1.5}, "task.repeats=1.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    """Oracle: the message names the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        Induction(**settings)
