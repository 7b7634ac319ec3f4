"""What the bench compares."""

from dataclasses import dataclass

from common.config import check_types, one_of, positive
from common.errors import ConfigError
from serve.kv import POLICIES

PARTS = ("quality", "tasks", "speed", "baseline")
QUERIES = ("known", "late")
"""Whether a prompt is compacted after its question has been read, or already before it."""


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
            context and batch, random weights), ``baseline`` (against transformers' generate).
        policies: Names of cache policies; empty for all.
        summaries: Values of ``kv.summary_tokens`` that are compared.
        budgets: Cache budgets, as shares of a window or of a prompt.
        windows: Held-out windows of the quality part.
        length: Their length in tokens, at most the context; None for the context.
        examples: Questions of the tasks part.
        queries: Of ``known`` (the cache is first compacted when the whole prompt, question
            included, has been read) and ``late`` (already while it is read).
        contexts: Cached tokens of the speed part.
        batches: Requests at the same time, for speed and baseline.
        share: Budget of the speed part, as a share of the context.
        steps: Decode steps per timing.
        rounds: Timings of each kind, interleaved.
        model: What the speed and baseline parts run.

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
    contexts: tuple[int, ...] = (1024, 8192)
    batches: tuple[int, ...] = (1, 16)
    share: float = 0.125
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
        for share in (*self.budgets, self.share):
            if not 0 < share < 1:
                raise ConfigError(
                    f"bench: a budget of {share} of the tokens: expected a share between 0 and 1, "
                    "such as 0.25; correct bench.budgets or bench.share"
                )
        if not self.parts:
            raise ConfigError(f"bench.parts=[]: expected at least one of {', '.join(PARTS)}")
        for context in self.contexts:
            if "speed" in self.parts and context <= self.decoded:
                raise ConfigError(
                    f"bench.contexts={list(self.contexts)}: expected more than the {self.decoded} "
                    "tokens that are decoded; raise them, or lower bench.steps or bench.rounds"
                )

    @property
    def decoded(self) -> int:
        """Tokens that each request of the speed part decodes, the warm-up included."""
        return self.steps * (self.rounds + 1) + 2

    @property
    def compressing(self) -> list[str]:
        """Names of the policies that are compared with the full cache."""
        names = self.policies or sorted(POLICIES)
        return [name for name in names if name != "full"]
