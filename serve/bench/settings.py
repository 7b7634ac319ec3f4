"""What the bench compares."""

import math
from dataclasses import dataclass

from common.config import check_types, one_of, positive
from common.errors import ConfigError
from serve.engine.config import EngineConfig
from serve.kv import POLICIES

PARTS = ("quality", "tasks", "speed", "baseline")
QUERIES = ("known", "late")
"""Whether a prompt is compacted after its question has been read, or already before it."""
CONTEXTS = (1024, 8192)
LENGTH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedModel:
    """A model of random weights for timing; the default has 10 million parameters.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        width: Of the residual stream.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        mlp_width: Neurons of an MLP.
    """

    vocab_size: int = 4096
    width: int = 256
    layers: int = 12
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 1152

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.__slots__:
            positive(f"bench.model.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Which figures of which policies are taken.

    Attributes:
        parts: Of ``quality`` (teacher-forced KL divergence and loss on held-out text), ``tasks``
            (exact answers to the questions of a task), ``speed`` (decoding and memory against
            context and batch), ``baseline`` (against transformers' generate).
        policies: Names of cache policies; empty for all.
        summaries: Values of ``kv.summary_tokens`` that are compared.
        budgets: Cache budgets, as shares of a window, a prompt, or a context of the speed part.
        windows: Held-out windows of the quality part.
        length: Their length in tokens, at most the context; None for the context, at most 1024.
        examples: Questions of the tasks part.
        queries: Of ``known`` (the cache is first compacted when the whole prompt, question
            included, has been read; the first token of an answer is then that of the full cache)
            and ``late`` (already while the prompt is read, before its question).
        contexts: Cached tokens of the speed part; empty for 1024 and 8192, but not more than the
            model's context.
        batches: Requests at the same time, for speed and baseline.
        steps: Decode steps per timing; each has a compaction.
        rounds: Timings of each kind, interleaved.
        model: Random weights for speed and baseline, where no other model is given.

    Raises:
        ConfigError: for an impossible value.
    """

    parts: tuple[str, ...] = ("quality", "tasks")
    policies: tuple[str, ...] = ()
    summaries: tuple[int, ...] = (0,)
    budgets: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5)
    windows: int = 8
    length: int | None = None
    examples: int = 100
    queries: tuple[str, ...] = QUERIES
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 16)
    steps: int = 16
    rounds: int = 5
    model: SpeedModel = SpeedModel()

    def __post_init__(self) -> None:
        check_types(self)
        for name, options in (("parts", PARTS), ("policies", POLICIES), ("queries", QUERIES)):
            for value in getattr(self, name):
                one_of(f"bench.{name}", value, options)
        for name in ("windows", "examples", "steps", "rounds"):
            positive(f"bench.{name}", getattr(self, name))
        for name in ("contexts", "batches"):
            for value in getattr(self, name):
                positive(f"bench.{name}", value)
        for value in self.summaries:
            positive("bench.summaries", value, zero=True)
        for share in self.budgets:
            if not 0 < share < 1:
                raise ConfigError(
                    f"bench.budgets={list(self.budgets)}: expected shares between 0 and 1, such as "
                    "0.25; correct it"
                )
        for name in ("parts", "batches", "budgets", "summaries"):
            if not getattr(self, name):
                raise ConfigError(f"bench.{name}=[]: expected at least one value; add it")
        self.shapes()

    def shapes(self, limit: int | None = None) -> list[tuple[int, int]]:
        """Return contexts and batches of the speed part; none where it is not asked for.

        Args:
            limit: The model's context.

        Raises:
            ConfigError: for a context beyond the model's, or one too short to be measured.
        """
        if "speed" not in self.parts:
            return []
        longest = limit or max(CONTEXTS + self.contexts)
        contexts = self.contexts or sorted({min(context, longest) for context in CONTEXTS})
        if max(contexts) > longest:
            raise ConfigError(
                f"bench.contexts={list(contexts)}: expected at most the model's context of "
                f"{longest}; lower them"
            )
        shapes = [(context, batch) for context in contexts for batch in self.batches]
        for context, batch in shapes:
            decoded = self.decoded(context, batch)
            least = math.floor(decoded / (1 - max(self.budgets))) + 1
            if context < least:
                raise ConfigError(
                    f"bench.contexts={list(contexts)}: expected at least {least} tokens, of which "
                    f"{decoded} are decoded at batch {batch}; raise them, or lower bench.steps, "
                    "bench.rounds, bench.batches or bench.budgets"
                )
        return shapes

    def decoded(self, context: int, batch: int) -> int:
        """Return how many tokens a request of the speed part may decode, the warm-up included."""
        return self.steps * (self.rounds + 1) + 2 + overlap(context, batch)

    @property
    def compressing(self) -> list[str]:
        """Names of the policies that are compared with the full cache."""
        names = self.policies or sorted(POLICIES)
        return [name for name in names if name != "full"]


def overlap(context: int, batch: int) -> int:
    """Return the steps in which the first request may decode while others' prompts are read."""
    return -(-context * batch // EngineConfig().max_num_batched_tokens) + 1
