"""The policies that are compared, at one budget."""

import dataclasses
import logging
from collections.abc import Iterator

from common.errors import BundleError
from serve.bench.rows import digest
from serve.bench.settings import BenchConfig
from serve.evaluate import with_budget
from serve.kv import POLICIES, Policy
from serve.llm import policy_stats
from serve.loading import Served

log = logging.getLogger(__name__)

INTERVALS = 4  # a budget is exceeded by at most this fraction of itself


def budget_tokens(share: float, length: int) -> int:
    """Return the budget in tokens for a share of ``length`` tokens, at least 4."""
    return max(4, round(share * length))


def usable(settings: BenchConfig, served: Served) -> BenchConfig:
    """Return the settings without the policies whose statistics the model lacks.

    Raises:
        BundleError: if such a policy was asked for by name, or statistics cannot be used.
    """
    left = []
    for name in settings.compressing:
        try:
            policy_stats(served, POLICIES[name]())
            left.append(name)
        except BundleError as error:
            if settings.policies or served.kv_stats is not None:
                raise
            log.warning("policy %s is left out: %s", name, error)
    return dataclasses.replace(settings, policies=("full", *left))


def statistics_of(served: Served, policy: Policy) -> dict[str, str | None]:
    """Return the hash of the calibration that a policy's rows depend on, by name."""
    return {"stats": digest(served.kv_stats)} if policy.needs_stats else {}


def compared(
    settings: BenchConfig, budget: int, *, compress_prefill: bool = False
) -> Iterator[tuple[dict[str, object], Policy]]:
    """Yield the keys of a row and the policy, for all policies and numbers of mean tokens.

    All grow beyond the budget by the same quarter of it before they are compacted.

    Args:
        settings: Names and mean tokens.
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
            yield {"policy": name, "summary_tokens": summary}, policy
