"""The recall task: what a prompt says, what an answer is worth."""

import re

import pytest

from common.errors import ConfigError
from common.tasks import Recall

HARD = Recall(length=120, needles=12, digits=3, seed=5)
TASK = pytest.mark.parametrize("task", [Recall(), HARD, Recall(needles=1)], ids=str)


def solve(prompt: str) -> set[str]:
    """Return every value that the prompt gives to the key it asks for."""
    asked = prompt[-1]
    return set(re.findall(rf"{asked}(\d+);", prompt))


@TASK
def test_prompt_determines_the_answer(task: Recall) -> None:
    """Oracle: a regular expression over the prompt finds exactly one value, the answer."""
    for example in task.examples(150):
        assert solve(example.prompt) == {example.answer}
        assert len(example.answer) == task.digits
        assert len(example.prompt) == task.length


@TASK
def test_needle_is_where_it_is_said_to_be(task: Recall) -> None:
    """Oracle: the text of the span; without it the prompt has no answer left."""
    for example in task.examples(60):
        ((first, last),) = example.needles
        assert example.prompt[first:last] == f"{example.prompt[-1]}{example.answer};"
        assert solve(example.prompt[:first] + example.prompt[last:]) == set()
        assert example.facts["position"] == first / len(example.prompt)


def test_prompt_holds_all_needles_once() -> None:
    """Oracle: the pairs of the prompt, counted."""
    for example in HARD.examples(60):
        keys = re.findall(r"([A-Z])\d{3};", example.prompt)
        assert len(keys) == len(set(keys)) == HARD.needles


def test_asked_needles_lie_in_all_thirds_in_turn() -> None:
    """Oracle: start, middle and end a third each; mean positions differ as their thirds do."""
    examples = Recall().examples(600)
    assert [example.facts["place"] for example in examples] == [0.0, 1.0, 2.0] * 200
    for place in range(3):
        found = [e.facts["position"] for e in examples if e.facts["place"] == place]
        inside = [place / 3 <= position < (place + 1) / 3 for position in found]
        assert sum(inside) / len(inside) > 0.8
        assert sum(found) / len(found) == pytest.approx((place + 0.5) / 3, abs=0.05)


@TASK
def test_documents_answer_their_own_questions(task: Recall) -> None:
    """Oracle: the same expression on the text before the questions; three for each pair."""
    counts = set()
    for index in range(200):
        document = task.document(index)
        body, *questions = document.removesuffix("\n").split("?")
        given = dict(re.findall(r"([A-Z])(\d+);", body))
        for question in questions:
            key, value = re.fullmatch(r"([A-Z])(\d+);", question).groups()
            assert given[key] == value
        assert len(questions) == 3 * len(given)
        assert len(body) <= task.length
        assert document.count("\n") == 1
        counts.add(len(given))
    assert counts == set(range(min(2, task.needles), task.needles + 1))


def test_values_are_uniform() -> None:
    """Oracle: 4,000 answers over 100 values, chi-square below its 99.9 % quantile (148.2)."""
    answers = [example.answer for example in Recall().examples(4000)]
    expected = len(answers) / 100
    chi2 = sum((answers.count(f"{v:02}") - expected) ** 2 / expected for v in range(100))
    assert chi2 < 148.2


@pytest.mark.parametrize(
    ("output", "exact", "digits"),
    [
        ("4 7", 0, 1 / 3),
        ("47", 1, 1),
        ("47;?B02;", 1, 1),
        ("48;", 0, 0.5),
        ("74;", 0, 0),
        ("470;", 0, 2 / 3),
        ("4;7", 0, 0.5),
        ("", 0, 0),
    ],
)
def test_score_is_a_strict_match(output: str, exact: float, digits: float) -> None:
    """Oracle: counted by hand for the answer 47."""
    task = Recall()
    example = next(e for e in map(task.example, range(10000)) if e.answer == "47")
    assert task.score(example, output) == {"exact": exact, "digits": digits}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"needles": 27}, "task.needles=27: expected 1 to 26"),
        ({"length": 20}, "task.length=20: 8 needles need at least 34"),
        ({"digits": 0}, "task.digits=0"),
        ({"seed": -1}, "task.seed=-1"),
        ({"length": "long"}, "length='long': expected int"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    """Oracle: the message names the value and what was expected."""
    with pytest.raises(ConfigError, match=message):
        Recall(**settings)
