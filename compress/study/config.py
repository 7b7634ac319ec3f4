"""Which rows the table of a study has, and what is measured for them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from common.config import check_types, one_of, positive, within
from common.errors import ConfigError
from compress.compensate import METHODS
from compress.scoring.fidelity import SCORES

KINDS = {"mlp": "keep", "heads": "keep_heads"}
"""What is removed, and the name of its budget in ``CompressConfig``."""
ROTATION = "rotation"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """Which rows the table has and what is measured for them.

    Attributes:
        keeps: Fractions of the MLP parameters that stay, attention whole.
        heads: Fractions of the attention heads that stay, MLPs whole.
        scores: Names in ``fidelity.SCORES``; empty for all.
        comps: Names in ``compensate.METHODS``; empty for all.
        tighten: Whether the certificate of every row is tightened, as those of bundles are.
        deviation: Whether the change of the output is bounded.
        bound_evals: Eigen-decompositions per block spent on that bound.
        rotation: Whether the rotation opponent takes part.
        rounds: Paired timings per shape.
        batch: Sequences of a timed forward pass.
        length: Tokens per timed sequence.
    """

    keeps: tuple[float, ...] = (0.9, 0.8, 0.7, 0.5, 0.25)
    heads: tuple[float, ...] = (0.75, 0.5)
    scores: tuple[str, ...] = ()
    comps: tuple[str, ...] = ()
    tighten: bool = True
    deviation: bool = True
    bound_evals: int = 0
    rotation: bool = True
    rounds: int = 9
    batch: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        check_types(self)
        for name, options in (("scores", SCORES), ("comps", METHODS)):
            for value in getattr(self, name):
                one_of(f"study.{name}", value, options)
        for name in ("keeps", "heads"):
            for value in getattr(self, name):
                within(f"study.{name}", value, 0.0, 1.0)
                positive(f"study.{name}", value)
        if not self.keeps and not self.heads:
            raise ConfigError(
                "study.keeps=[] and study.heads=[]: expected at least one budget; give fractions "
                "that stay, such as study.keeps=[0.5]"
            )
        positive("study.bound_evals", self.bound_evals, zero=True)
        positive("study.rounds", self.rounds)
        for name in ("batch", "length"):
            if getattr(self, name) is not None:
                positive(f"study.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row: what is removed, and how."""

    kind: str
    keep: float
    score: str
    comp: str
    order: str = "one_shot"

    @property
    def method(self) -> str:
        """Score and compensation."""
        return f"{self.score}+{self.comp}"

    def is_of(self, point: Mapping[str, Any]) -> bool:
        """Return whether a stored row is this one."""
        return all(point[name] == value for name, value in dataclasses.asdict(self).items())


def cases(settings: StudyConfig, default: str) -> Iterator[Case]:
    """Return all rows: per budget the default in both orders and the opponent, then the rest.

    Args:
        settings: Budgets and methods.
        default: The default method, ``SCORE+COMP``; always a row.
    """
    score, comp = default.split("+")
    scores, comps = settings.scores or tuple(SCORES), settings.comps or tuple(METHODS)
    budgets = [("mlp", k) for k in settings.keeps] + [("heads", k) for k in settings.heads]
    firsts = [(score, comp, "one_shot"), (score, comp, "sequential")]
    firsts += [(ROTATION, "none", "one_shot")] if settings.rotation else []
    for kind, keep in budgets:
        for name, how, order in firsts:
            yield Case(kind=kind, keep=keep, score=name, comp=how, order=order)
    for name, how in [(s, c) for s in scores for c in comps if (s, c) != (score, comp)]:
        for kind, keep in budgets:
            yield Case(kind=kind, keep=keep, score=name, comp=how)
