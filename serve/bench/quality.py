"""Teacher-forced quality of every policy: loss and divergence from the full cache."""

# Legend: N windows, T tokens, V vocabulary.

import functools
import statistics
from typing import Any

from torch import Tensor

from common.bundle import Bundle
from common.bundle_format import CERTIFICATE
from serve.bench.policies import budget_tokens, compared, statistics_of
from serve.bench.rows import Rows, digest
from serve.bench.settings import BenchConfig
from serve.decoder import Decoder, as_decoder
from serve.evaluate import bits_per_token, full_logits, score_policy
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger
from serve.llm import policy_stats
from serve.loading import Served

MEANS = ("kl_vs_full", "kept_fraction", "top1_agreement", "bits_per_token")
LOGITS = 1 << 28  # of one pass, which bounds the memory; at least one window


def measure_quality(
    rows: Rows,
    settings: BenchConfig,
    served: Served,
    windows_NT: Tensor,
    ledger: EvictionLedger | None,
) -> None:
    """Add one row per policy and budget.

    Args:
        rows: Where the rows go.
        settings: Policies and budgets.
        served: A language model.
        windows_NT: Held-out windows (N, T + 1): inputs, and their successors.
        ledger: Bounds the deviation; None leaves the certified figures out.
    """
    text = _Text(as_decoder(served.model), windows_NT)
    of_text = {"text": digest(windows_NT)}
    rows.make("quality", {"policy": "full"}, lambda: text.full_figures() | {"budget": 1.0}, of_text)
    proof = {} if ledger is None else {"certificate": _proof(served)}
    for share in settings.budgets:
        budget = budget_tokens(share, text.length)
        for keys, policy in compared(settings, budget):

            def figures(policy: Policy = policy) -> dict[str, Any]:
                return text.figures(policy, policy_stats(served, policy), ledger)

            where = keys | {"budget": share, "tokens": budget}
            rows.make("quality", where, figures, of_text | statistics_of(served, policy) | proof)


class _Text:
    """Held-out windows in groups whose logits fit the memory."""

    def __init__(self, decoder: Decoder, windows_NT: Tensor) -> None:
        self.decoder, self.length = decoder, windows_NT.shape[1] - 1
        size = max(1, LOGITS // (self.length * decoder.vocab_size))
        self.groups = windows_NT.split(size)
        # With one group the full cache runs once for all policies.
        self.reference = functools.lru_cache(1)(self._reference)

    def _reference(self, group: int) -> Tensor:
        return full_logits(self.decoder, self.groups[group][:, :-1])

    def full_figures(self) -> dict[str, float]:
        """Return the loss under the full cache."""
        losses = [
            bits_per_token(self.reference(i), windows[:, 1:])
            for i, windows in enumerate(self.groups)
        ]
        return {"bits_per_token": self._mean(losses)}

    def figures(
        self, policy: Policy, stats: Any, ledger: EvictionLedger | None
    ) -> dict[str, float]:
        """Return the figures of a policy over all groups; certified ones with a ledger alone."""
        scores = [
            score_policy(
                self.decoder,
                windows_NT[:, :-1],
                policy,
                reference_NTV=self.reference(index),
                targets_NT=windows_NT[:, 1:],
                stats=stats,
                ledger=ledger,
            )
            for index, windows_NT in enumerate(self.groups)
        ]
        means, largest = list(MEANS), ["measured_deviation"]
        if ledger is not None:
            means, largest = [*means, "certified_top1"], [*largest, "certified_deviation"]
        return {name: self._mean([getattr(s, name) for s in scores]) for name in means} | {
            name: max(getattr(score, name) for score in scores) for name in largest
        }

    def _mean(self, values: list[float]) -> float:
        """Return the mean over windows."""
        return statistics.fmean(values, [float(len(group)) for group in self.groups])


def _proof(served: Served) -> str | None:
    """Return the hash of the stored certificate."""
    files = served.manifest["files"] if isinstance(served, Bundle) else {}
    return digest({name: value for name, value in files.items() if name in CERTIFICATE})
