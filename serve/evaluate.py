"""What a compressed cache costs: teacher-forced comparison with full attention on held-out text.

The same tokens run once through the plain model and once through the paged cache, compacted at the
lengths at which generation would compact it. Measured figures are estimates from below; the
certified deviation is a bound.
"""

# Legend: N windows, T tokens, V vocabulary.

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ShapeError
from common.models import LipschitzTransformer
from serve.causal import CausalAttention
from serve.decoder import Decoder, as_decoder
from serve.engine.config import EngineConfig
from serve.engine.runner import Stats
from serve.kv import Policy
from serve.kv.eviction import EvictionLedger
from serve.replay import replay


@dataclass(frozen=True, kw_only=True, slots=True)
class KvScore:
    """One policy and budget against the full cache; a point of the frontier.

    Attributes:
        policy: Name of the policy.
        budget: Tokens kept per layer and key/value head; the window length for the full cache.
        kl_vs_full: Mean over tokens of KL(full || compressed) of the next token, nats.
        kept_fraction: Mean over tokens of cached / seen tokens.
        measured_deviation: Largest RMS change of a token's logits over the vocabulary; estimate.
        certified_deviation: Bound on the same; None without a certificate.
        top1_agreement: Share of tokens with the same most probable next token; estimate.
        certified_top1: Share of tokens for which that is proved; None without a certificate.
        tokens_per_s: Decode speed at the end of the windows, all windows together.
        bits_per_token: Mean cross-entropy of the successors; None where they were not given.
    """

    policy: str
    budget: int
    kl_vs_full: float
    kept_fraction: float
    measured_deviation: float
    certified_deviation: float | None
    top1_agreement: float
    certified_top1: float | None
    tokens_per_s: float
    bits_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self)


@torch.inference_mode()
def full_logits(model: LipschitzTransformer | Decoder, tokens_NT: Tensor) -> Tensor:
    """Return the plain model's logits (N, T, V), window by window."""
    decoder = as_decoder(model)
    attend = CausalAttention(decoder.layers, windows=1)
    positions_T = torch.arange(tokens_NT.shape[1], device=decoder.device)
    rows = tokens_NT.to(decoder.device)
    return torch.stack([decoder.forward(row_T, positions_T, attend) for row_T in rows])


@torch.inference_mode()
def score_policy(
    model: LipschitzTransformer | Decoder,
    tokens_NT: Tensor,
    policy: Policy,
    *,
    reference_NTV: Tensor | None = None,
    targets_NT: Tensor | None = None,
    stats: Stats = None,
    ledger: EvictionLedger | None = None,
    config: EngineConfig | None = None,
) -> KvScore:
    """Compare one policy with full attention on the same tokens.

    Tokens that still see every key count as unchanged: there only rounding differs.

    Args:
        model: Model in evaluation mode.
        tokens_NT: Held-out windows of equal length.
        policy: Cache policy.
        reference_NTV: ``full_logits`` of the windows, when already known.
        targets_NT: Successor of each token, for the loss.
        stats: Calibration statistics of each layer, for policies that need them.
        ledger: Bounds the deviation; None leaves the certified figures out.
        config: Engine settings.

    Raises:
        ShapeError: if the windows are empty or longer than the context.
    """
    context = model.context if isinstance(model, Decoder) else model.config.context
    if tokens_NT.numel() == 0 or tokens_NT.shape[1] > context:
        raise ShapeError(
            f"windows {tuple(tokens_NT.shape)}: expected at least one token and at most the "
            f"context of {context}; choose other windows"
        )
    full = full_logits(model, tokens_NT) if reference_NTV is None else reference_NTV
    run = replay(model, tokens_NT, policy, stats, ledger, config)
    lost_T = (run.kept_T < 1).to(full.device)
    full_log, log = (torch.log_softmax(x.double(), dim=-1) for x in (full, run.logits_NTV))
    kl_NT = (full_log.exp() * (full_log - log)).sum(-1).clamp(min=0) * lost_T
    rms_NT = (full.double() - run.logits_NTV.double()).square().mean(-1).sqrt() * lost_T
    same_NT = (full.argmax(-1) == run.logits_NTV.argmax(-1)) | ~lost_T
    certified, keeps = run.certified_N, run.keeps_top1_NT
    return KvScore(
        policy=policy.name,
        budget=tokens_NT.shape[1] if policy.budget is None else policy.budget,
        kl_vs_full=float(kl_NT.mean()),
        kept_fraction=float(run.kept_T.mean()),
        measured_deviation=float(rms_NT.max()),
        certified_deviation=None if certified is None else float(certified.max()),
        top1_agreement=float(same_NT.double().mean()),
        certified_top1=None if keeps is None else float(keeps.double().mean()),
        tokens_per_s=run.tokens_per_s,
        bits_per_token=None if targets_NT is None else bits_per_token(run.logits_NTV, targets_NT),
    )


def bits_per_token(logits_NTV: Tensor, targets_NT: Tensor) -> float:
    """Return the mean cross-entropy of the targets in bits."""
    targets = targets_NT.flatten().to(logits_NTV.device)
    return float(F.cross_entropy(logits_NTV.flatten(0, 1).double(), targets)) / math.log(2)


def with_budget(policy: Policy, budget: int) -> Policy:
    """Return the policy at another budget, protecting fewer tokens where it must."""
    sinks, window = min(policy.sinks, budget // 4), min(policy.window, budget // 2)
    return dataclasses.replace(policy, budget=budget, sinks=sinks, window=window)


def frontier(
    model: LipschitzTransformer | Decoder,
    tokens_NT: Tensor,
    policies: Sequence[Policy],
    *,
    stats: Stats = None,
    ledger: EvictionLedger | None = None,
    config: EngineConfig | None = None,
    on_point: Callable[[int], None] | None = None,
) -> list[KvScore]:
    """Score several policies on the same windows, computing full attention once.

    Args:
        model: Model in evaluation mode.
        tokens_NT: Held-out windows of equal length.
        policies: Policies with their budgets, see ``with_budget``.
        stats: Calibration statistics of each layer.
        ledger: Bounds the deviation.
        config: Engine settings.
        on_point: Told how many points are done.
    """
    reference_NTV = full_logits(model, tokens_NT)
    scores = []
    for policy in policies:
        score = score_policy(
            model,
            tokens_NT,
            policy,
            reference_NTV=reference_NTV,
            stats=stats,
            ledger=ledger,
            config=config,
        )
        scores.append(score)
        if on_point is not None:
            on_point(len(scores))
    return scores
