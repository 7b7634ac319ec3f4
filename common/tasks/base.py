"""What a task is: documents to train on, and examples whose answer the prompt determines."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from common.config import check_types, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A prompt and the only right continuation of it.

    All texts are ASCII, so that characters, bytes and the positions of both agree.

    Attributes:
        prompt: What the model reads.
        answer: What it has to write, without the task's ``end``.
        needles: Spans (first, after the last) of the prompt's characters that the answer needs.
        facts: What the accuracy may depend on, by name.
    """

    prompt: str
    answer: str
    needles: tuple[tuple[int, int], ...]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task(ABC):
    """A generator of documents and examples, each a pure function of the settings and a number.

    Attributes:
        seed: Of everything that is generated; documents and examples are independent streams.
    """

    seed: int = 0
    name: ClassVar[str] = ""
    end: ClassVar[str] = "\n"
    """The character that ends an answer in the documents; generation stops there."""

    def __post_init__(self) -> None:
        check_types(self)
        positive("task.seed", self.seed, zero=True)

    @abstractmethod
    def document(self, index: int) -> str:
        """Return training document ``index``: ASCII, ended by a newline."""

    @abstractmethod
    def example(self, index: int) -> Example:
        """Return evaluation example ``index``."""

    @abstractmethod
    def score(self, example: Example, output: str) -> dict[str, float]:
        """Return the figures of a model's output, each 0 to 1; ``exact`` is the strict match.

        Args:
            example: The question.
            output: What the model wrote; ignored from ``end`` on.
        """

    def documents(self) -> Iterator[str]:
        """Yield documents without end."""
        index = 0
        while True:
            yield self.document(index)
            index += 1

    def examples(self, count: int) -> list[Example]:
        """Return the first ``count`` examples."""
        return [self.example(index) for index in range(count)]

    def generator(self, stream: str, index: int) -> random.Random:
        """Return the random numbers of one document or example.

        Args:
            stream: ``document`` or ``example``.
            index: Its number.
        """
        # Seeding by text goes through SHA-512: neighbouring numbers are unrelated.
        return random.Random(f"{self.name}/{self.seed}/{stream}/{index}")


def written(output: str, end: str) -> str:
    """Return the part of an output before ``end``."""
    return output.partition(end)[0]


def matching_share(answer: str, output: str) -> float:
    """Return the share of an answer's characters that the output has at the same place."""
    same = sum(a == b for a, b in zip(answer, output, strict=False))
    return same / max(len(answer), len(output), 1)
