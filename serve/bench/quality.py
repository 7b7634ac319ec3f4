"""Teacher-forced quality of every policy: loss and divergence from the full cache."""

# Legend: N windows, T tokens.

from typing import Any

import torch
from torch import Tensor

from common.bundle import Bundle
from serve.bench.policies import budget_tokens, compared
from serve.bench.rows import Rows
from serve.bench.settings import BenchConfig
from serve.evaluate import bits_per_token, full_logits, score_policy
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger
from serve.llm import policy_stats


def measure_quality(
    rows: Rows,
    settings: BenchConfig,
    bundle: Bundle,
    windows_NT: Tensor,
    ledger: EvictionLedger | None,
) -> None:
    """Add one row per policy and budget.

    Args:
        rows: Where the rows go.
        settings: Policies and budgets.
        bundle: A language model.
        windows_NT: Held-out windows (N, T + 1): inputs, and their successors.
        ledger: Bounds the deviation; None leaves the certified figures out.
    """
    inputs_NT, targets_NT = windows_NT[:, :-1], windows_NT[:, 1:]
    reference_NTV = full_logits(bundle.model, inputs_NT)
    loss = bits_per_token(reference_NTV, targets_NT)
    rows.make("quality", {"policy": "full"}, lambda: {"bits_per_token": loss, "budget": 1.0})
    for share in settings.budgets:
        budget = budget_tokens(share, inputs_NT.shape[1])
        for keys, policy in compared(settings, bundle, budget):

            def figures(policy: Policy = policy, share: float = share) -> dict[str, Any]:
                score = score_policy(
                    bundle.model,
                    inputs_NT,
                    policy,
                    reference_NTV=reference_NTV,
                    targets_NT=targets_NT,
                    stats=policy_stats(bundle, policy),
                    ledger=ledger,
                )
                return score.to_dict() | {"budget": share}

            rows.make("quality", keys | {"budget": share, "tokens": budget}, figures)


def held_out(windows_NT: Tensor, context: int, length: int | None) -> Tensor:
    """Return the windows cut to ``length`` inputs and their successors, at most the context."""
    return windows_NT[:, : min(length or context, context) + 1].to(torch.int64)
