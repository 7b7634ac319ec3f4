"""Induction: in a random sequence a piece comes again; what followed it must follow again."""

import random
from dataclasses import dataclass
from typing import ClassVar

from common.config import positive, within
from common.errors import ConfigError
from common.tasks.base import Example, Task, matching_share, written

SYMBOLS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Induction(Task):
    """Random symbols that end with the cue of an earlier piece; the answer is the piece's rest.

    Attributes:
        length: Characters of an example's prompt and of a document.
        piece: Characters of a piece that comes again.
        cue: How many of them an example shows; the rest is the answer.
        symbols: Number of different symbols, up to 26.
        repeats: Share of a document that repeats pieces of what stands before.
    """

    length: int = 60
    piece: int = 8
    cue: int = 3
    symbols: int = 26
    repeats: float = 0.75
    name: ClassVar[str] = "induction"

    def __post_init__(self) -> None:
        # The two-argument form: slots make a new class, which super() without them misses.
        super(Induction, self).__post_init__()
        within("task.symbols", self.symbols, 2, len(SYMBOLS))
        within("task.repeats", self.repeats, 0.0, 1.0)
        positive("task.cue", self.cue)
        if self.piece <= self.cue:
            raise ConfigError(
                f"task.piece={self.piece}: expected more than task.cue={self.cue}; raise it"
            )
        if self.length < self.piece + self.cue:
            raise ConfigError(
                f"task.length={self.length}: expected at least piece + cue = "
                f"{self.piece + self.cue}; raise it"
            )
        # A random sequence must have a chance of not repeating the cue.
        if self.symbols**self.cue < self.length:
            raise ConfigError(
                f"task.cue={self.cue}: {self.symbols} symbols have fewer cues than task.length="
                f"{self.length}; raise cue or symbols"
            )

    def document(self, index: int) -> str:
        """Return random symbols, in which pieces from anywhere before come again anywhere.

        Were pieces aligned, a model could copy by distance alone.
        """
        generator = self.generator("document", index)
        text = self._random(generator, self.piece)
        while len(text) < self.length:
            if generator.random() < self.repeats:
                start = generator.randint(0, len(text) - self.piece)
                text += text[start : start + self.piece]
            else:
                text += self._random(generator, generator.randint(1, 2 * self.piece - 1))
        return text[: self.length] + self.end

    def example(self, index: int) -> Example:
        """Return a prompt of ``length`` characters whose last ``cue`` stand there only once before.

        The fact ``position`` is the start of the piece as a share of the prompt.
        """
        generator = self.generator("example", index)
        length = self.length - self.cue
        while True:
            text = self._random(generator, length)
            start = generator.randint(0, length - self.piece)
            cue = text[start : start + self.cue]
            # Overlaps count: the cue may not straddle the end either.
            if (text + cue).find(cue, start + 1) == length and text.find(cue) == start:
                break
        return Example(
            prompt=text + cue,
            answer=text[start + self.cue : start + self.piece],
            needles=((start, start + self.piece),),
            facts={"position": start / self.length},
        )

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Return ``exact`` and ``symbols`` (the share of symbols at their place).

        Only as many symbols as the answer has are read: the sequence could go on.
        """
        text = written(output, self.end)[: len(example.answer)]
        return {
            "exact": float(text == example.answer),
            "symbols": matching_share(example.answer, text),
        }

    def _random(self, generator: random.Random, count: int) -> str:
        return "".join(generator.choices(SYMBOLS[: self.symbols], k=count))
