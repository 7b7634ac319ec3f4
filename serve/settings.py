"""Settings of the ``generate`` command."""

from dataclasses import dataclass

from common.config import check_types, positive
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What to continue, and how much held-out text measures the cache policy.

    Attributes:
        prompts: Texts to continue.
        prompt_file: UTF-8 file with one prompt per line, used when ``prompts`` is empty.
        num_prompts: Prompts taken from held-out text when neither is given.
        prompt_tokens: Their length in tokens, at most half the context.
        eval_windows: Held-out windows of the comparison with the full cache; 0 leaves it out.
        eval_tokens: Length of a window in tokens, at most the context.
        frontier: Budgets to compare, as shares of a window.
        policies: Policies to compare at these budgets.

    Raises:
        ConfigError: for an impossible value.
    """

    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    num_prompts: int = 3
    prompt_tokens: int = 64
    eval_windows: int = 2
    eval_tokens: int = 256
    frontier: tuple[float, ...] = (0.125, 0.25, 0.5)
    policies: tuple[str, ...] = ("window", "keydiff", "triattention")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_prompts", "prompt_tokens", "eval_tokens"):
            positive(f"generate.{name}", getattr(self, name))
        positive("generate.eval_windows", self.eval_windows, zero=True)
        for share in self.frontier:
            if not 0 < share < 1:
                raise ConfigError(
                    f"generate.frontier={list(self.frontier)}: expected shares between 0 and 1, "
                    "such as 0.25; correct it"
                )
