"""The policies that are compared, at one budget."""

import dataclasses
import logging
from collections.abc import Iterator

from common.bundle import Bundle
from common.errors import BundleError
from serve.bench.settings import BenchConfig
from serve.evaluate import with_budget
from serve.kv import POLICIES, Policy
from serve.llm import policy_stats

log = logging.getLogger(__name__)

INTERVALS = 4  # a budget is exceeded by at most this fraction of itself


def budget_tokens(share: float, length: int) -> int:
    """Return the budget in tokens for a share of ``length`` tokens, at least 4."""
    return max(4, round(share * length))


def compared(
    settings: BenchConfig, bundle: Bundle | None, budget: int, *, compress_prefill: bool = False
) -> Iterator[tuple[dict[str, object], Policy]]:
    """Yield the keys of a row and the policy, for all policies and numbers of mean tokens.

    All grow beyond the budget by the same quarter of it before they are compacted.

    Args:
        settings: Names and mean tokens.
        bundle: Policies whose statistics it lacks are left out; None leaves none out.
        budget: Tokens kept.
        compress_prefill: Whether prompts are compacted while they are read.
    """
    for name in settings.compressing:
        for summary in settings.summaries:
            policy = dataclasses.replace(
                with_budget(POLICIES[name](), budget),
                interval=max(1, budget // INTERVALS),
                summary_tokens=summary,
                compress_prefill=compress_prefill,
                protect_prompt=False,
            )
            try:
                if bundle is not None:
                    policy_stats(bundle, policy)
            except BundleError as error:
                log.warning("policy %s is left out: %s", name, error)
                break
            yield {"policy": name, "summary_tokens": summary}, policy
