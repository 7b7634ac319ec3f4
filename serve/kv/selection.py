"""Which slots survive: protection, sharing between heads and layers, ties."""

# Legend: R rows (layer-major), K key/value heads, G query heads of one, S slots, Q requests.

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError
from serve.decoder import LayerSpec
from serve.kernels import select_slots
from serve.kv.policy import Policy
from serve.kv.positional import future_mass
from serve.kv.view import CacheView

SIGMA_MIN = 1e-6  # scores that vary less are all equal (spec: population deviation, no noise)


def is_protected(policy: Policy, positions_RKS: Tensor, prompts_R: Tensor) -> Tensor:
    """Return which slots are pinned or recent (R, K, S), bool.

    Args:
        policy: Its sinks, window and prompt protection apply.
        positions_RKS: Original positions, -1 in unfilled slots; the newest token, whose position
            is the largest, is always in the cache when this is called.
        prompts_R: Prompt length of each row.
    """
    assert policy.budget is not None
    newest_RKS = positions_RKS.amax(-1, keepdim=True)
    is_recent = positions_RKS > newest_RKS - policy.window
    pinned_R = torch.full_like(prompts_R, policy.sinks)
    if policy.protect_prompt:
        pinned_R = torch.where(
            2 * prompts_R <= policy.budget, pinned_R.maximum(prompts_R), pinned_R
        )
    is_pinned = positions_RKS < pinned_R[:, None, None]
    return (positions_RKS >= 0) & (is_recent | is_pinned)


def check_sharing(policy: Policy, layers: Sequence[LayerSpec]) -> None:
    """Raise ``ConfigError`` if heads are to share sets and the layers differ in their number."""
    if policy.budget is None or policy.selection != "per_head":
        return
    counts = sorted({spec.kv_heads for spec in layers if spec.sliding_window is None})
    if len(counts) > 1:
        raise ConfigError(
            f"kv.selection=per_head: the layers have different numbers of key/value heads, {counts}"
            "; choose per_layer_per_head or union"
        )


def choose(policy: Policy, views: Sequence[CacheView], budget: int) -> list[Tensor]:
    """Score the cache and return the surviving slots.

    Args:
        policy: Scores the slots.
        views: All layers, in groups of one shape; the same requests in each.
        budget: Slots that survive, alike for all requests.

    Returns:
        Per view the kept slots (R, K, budget), int64, ascending; exact ties go to the larger
        position. A row shorter than the budget keeps its slots, followed by unfilled ones.

    Raises:
        ConfigError: if heads are to share sets and the layers have different numbers of them.
    """
    check_sharing(policy, [view.spec for view in views])
    scores = [_scores(policy, view) for view in views]
    if policy.selection != "per_layer_per_head":
        scores = _shared(policy, views, scores)
    return [_select(policy, view, score, budget) for view, score in zip(views, scores, strict=True)]


def standardize(raw_RKGS: Tensor, candidates_RKS: Tensor) -> Tensor:
    """Subtract the mean and divide by the population deviation over the candidates.

    Args:
        raw_RKGS: Finite scores.
        candidates_RKS: Slots that take part in the statistics.

    Returns:
        Same shape and dtype; zeros where the deviation is at most 1e-6.
    """
    is_out = ~candidates_RKS[:, :, None]
    count = candidates_RKS.sum(-1).clamp(min=1)[:, :, None, None]
    mean = raw_RKGS.masked_fill(is_out, 0).sum(-1, keepdim=True) / count
    centred = raw_RKGS - mean
    variance = centred.masked_fill(is_out, 0).square().sum(-1, keepdim=True) / count
    sigma = variance.sqrt()
    return torch.where(sigma > SIGMA_MIN, centred / sigma.clamp(min=SIGMA_MIN), 0)


def _scores(policy: Policy, view: CacheView) -> Tensor:
    """Score by the policy, in sliding windows by recency, in heads without content by the bias."""
    positions_RKS = view.slot_positions()
    if view.spec.sliding_window is not None:
        return positions_RKS.double()
    content = view.spec.content_heads // view.spec.group
    if policy.scores_positional:
        content = view.spec.kv_heads
    is_shared, parts = policy.selection != "per_layer_per_head", []
    if content:
        score_RKS = policy.score(view)[:, :content]
        is_raw = is_shared and not policy.is_standardized
        parts.append(_compared(policy, view, score_RKS, 0) if is_raw else score_RKS)
    if content < view.spec.kv_heads:
        mass_RKS = future_mass(view, policy.interval)
        parts.append(_compared(policy, view, mass_RKS, content) if is_shared else mass_RKS)
    dtype = parts[0].dtype if len(parts) == 1 else torch.float64
    return torch.cat([part.to(dtype) for part in parts], dim=1)


def _compared(policy: Policy, view: CacheView, scores_RKS: Tensor, first: int) -> Tensor:
    """Standardize the scores of some heads, so that heads and layers can be compared."""
    positions_RKS = view.slot_positions()[:, first : first + scores_RKS.shape[1]]
    is_free = (positions_RKS >= 0) & ~is_protected(policy, positions_RKS, view.prompts_R)
    finite_RKS = scores_RKS.masked_fill(positions_RKS < 0, 0)
    return standardize(finite_RKS[:, :, None], is_free)[:, :, 0]


def _select(policy: Policy, view: CacheView, scores_RKS: Tensor, budget: int) -> Tensor:
    positions_RKS = view.slot_positions()
    is_kept = is_protected(policy, positions_RKS, view.prompts_R)
    scores_RKS = scores_RKS.masked_fill(is_kept, torch.inf)
    scores_RKS = scores_RKS.masked_fill(positions_RKS < 0, -torch.inf)
    return select_slots(scores_RKS, positions_RKS, budget, backend=view.backend)


def _shared(policy: Policy, views: Sequence[CacheView], scores: Sequence[Tensor]) -> list[Tensor]:
    """Replace the scores by those shared between heads; slots are aligned, as the sets are."""
    full = [not view.spec.sliding_window for view in views]
    used = [
        score.unflatten(0, (len(view.layers), view.requests))
        for view, score, is_full in zip(views, scores, full, strict=True)
        if is_full
    ]
    if not used:
        return list(scores)
    if policy.selection == "union":
        common_QKS = torch.stack([x.amax((0, 2)) for x in used]).amax(0)[:, None]
    else:
        common_QKS = torch.cat(used).mean(0)
    shared = []
    for view, score, is_full in zip(views, scores, full, strict=True):
        common = common_QKS.expand(-1, score.shape[1], -1).repeat(len(view.layers), 1, 1)
        shared.append(common if is_full else score)
    return shared
