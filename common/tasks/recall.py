"""Passkey recall: keys and values hidden in filler text, a key asked for at the end."""

# What a document looks like: "we walk K47;snow falls onB02;the g?B02;?K47;".

import random
from dataclasses import dataclass
from typing import ClassVar

from common.config import positive, within
from common.errors import ConfigError
from common.tasks.base import Example, Task, matching_share, written

KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FILLER = (
    "the grass is green. ",
    "a river runs to the sea. ",
    "one bird sings in the tree. ",
    "we walk home in the rain. ",
    "snow falls on the hill. ",
)
ROUNDS = 3
"""Questions of a document per needle."""
PLACES = 3
"""The asked needle lies in the first, second or last third of the text, in turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall(Task):
    """Several needles in a haystack; the answer to ``?K`` is the value of ``K``.

    Few-needle documents with many questions come most: they teach looking up, the others distance.

    Attributes:
        length: Characters of an example's prompt; documents have up to as many before their
            questions.
        needles: Key/value pairs of an example, up to 26; documents have 2 to so many.
        digits: Digits of a value.
    """

    length: int = 240
    needles: int = 8
    digits: int = 2
    name: ClassVar[str] = "recall"
    end: ClassVar[str] = ";"

    def __post_init__(self) -> None:
        # The two-argument form: slots make a new class, which super() without them misses.
        super(Recall, self).__post_init__()
        within("task.needles", self.needles, 1, len(KEYS))
        positive("task.digits", self.digits)
        shortest = self.needles * self._needle + len(_question("K"))
        if self.length < shortest:
            raise ConfigError(
                f"task.length={self.length}: {self.needles} needles need at least {shortest} "
                "characters; raise it, or hide fewer"
            )

    @property
    def _needle(self) -> int:
        return len(_pair("K", "0" * self.digits))

    def document(self, index: int) -> str:
        """Return a text of random length and number of needles, and random questions to it."""
        generator = self.generator("document", index)
        fewest = min(2, self.needles)
        count = round(fewest * (self.needles / fewest) ** generator.random())
        room = self.length - len(_question("K")) - count * self._needle
        length = count * self._needle + generator.randint(0, room)
        text, pairs, _ = self._haystack(generator, count, length)
        asked = generator.choices(sorted(pairs), k=ROUNDS * count)
        return text + "".join(f"{_question(key)}{pairs[key]}{self.end}" for key in asked) + "\n"

    def example(self, index: int) -> Example:
        """Return a prompt of ``length`` characters; facts: ``place`` (third), ``position``.

        ``position`` is the asked pair's start as a share of the prompt.
        """
        generator = self.generator("example", index)
        length = self.length - len(_question("K"))
        text, pairs, starts = self._haystack(generator, self.needles, length)
        place = index % PLACES
        wanted = (place + generator.random()) / PLACES * length
        key = min(starts, key=lambda name: abs(starts[name] - wanted))
        start = starts[key]
        return Example(
            prompt=text + _question(key),
            answer=pairs[key],
            needles=((start, start + self._needle),),
            facts={"place": float(place), "position": start / self.length},
        )

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Return ``exact`` and ``digits`` (the share of digits at their place)."""
        text = written(output, self.end)
        return {
            "exact": float(text == example.answer),
            "digits": matching_share(example.answer, text),
        }

    def _haystack(
        self, generator: random.Random, count: int, length: int
    ) -> tuple[str, dict[str, str], dict[str, int]]:
        """Return a text of ``length`` characters, its pairs, and where each starts."""
        keys = generator.sample(KEYS, count)
        values = [f"{generator.randrange(10**self.digits):0{self.digits}}" for _ in keys]
        room = length - count * self._needle
        cuts = [0, *sorted(generator.randint(0, room) for _ in keys), room]
        text, starts = "", {}
        for number, (key, value) in enumerate(zip(keys, values, strict=True)):
            text += _filler(generator, cuts[number + 1] - cuts[number])
            starts[key] = len(text)
            text += _pair(key, value)
        text += _filler(generator, cuts[-1] - cuts[-2])
        return text, dict(zip(keys, values, strict=True)), starts


def _pair(key: str, value: str) -> str:
    return f"{key}{value};"


def _question(key: str) -> str:
    return f"?{key}"


def _filler(generator: random.Random, length: int) -> str:
    """Return whole sentences, the last one cut at ``length``."""
    text = ""
    while len(text) < length:
        text += generator.choice(FILLER)
    return text[:length]
