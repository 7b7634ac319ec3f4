"""Which slots survive: protection, sharing between heads and layers, ties."""

# Legend: R rows (layer-major), K key/value heads, S slots, L layers of a view, Q requests.

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError
from serve.kv.policy import Policy
from serve.kv.view import CacheView


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
    scores = [_scores(policy, view) for view in views]
    if policy.selection != "per_layer_per_head":
        scores = _shared(policy, views, scores)
    return [_select(policy, view, score, budget) for view, score in zip(views, scores, strict=True)]


def _scores(policy: Policy, view: CacheView) -> Tensor:
    if view.spec.sliding_window is not None:
        return view.slot_positions().double()
    return policy.score(view)


def _select(policy: Policy, view: CacheView, scores_RKS: Tensor, budget: int) -> Tensor:
    positions_RKS = view.slot_positions()
    is_kept = is_protected(policy, positions_RKS, view.prompts_R)
    scores_RKS = scores_RKS.masked_fill(is_kept, torch.inf)
    scores_RKS = scores_RKS.masked_fill(positions_RKS < 0, -torch.inf)
    return select_slots(scores_RKS, positions_RKS, budget)


def select_slots(scores_RKS: Tensor, positions_RKS: Tensor, budget: int) -> Tensor:
    """Return the slots (R, K, budget) with the highest scores, ascending; ties to the newest."""
    # Two stable sorts are a lexicographic one: by score, then by position, both descending.
    by_position = positions_RKS.argsort(dim=-1, descending=True, stable=True)
    ranked = scores_RKS.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    return by_position.gather(-1, ranked[..., :budget]).sort(dim=-1).values


def _shared(policy: Policy, views: Sequence[CacheView], scores: Sequence[Tensor]) -> list[Tensor]:
    """Replace the scores by those shared between heads; slots are aligned, as the sets are."""
    full = [not view.spec.sliding_window for view in views]
    used = [
        score.unflatten(0, (len(view.layers), view.requests))
        for view, score, is_full in zip(views, scores, full, strict=True)
        if is_full
    ]
    if policy.selection == "union":
        common_QKS = torch.stack([x.amax((0, 2)) for x in used]).amax(0)[:, None]
    else:
        if len({x.shape[2] for x in used}) > 1:
            raise ConfigError(
                "kv.selection=per_head: the layers have different numbers of key/value heads;"
                " choose per_layer_per_head or union"
            )
        common_QKS = torch.cat(used).mean(0)
    shared = []
    for view, score, is_full in zip(views, scores, full, strict=True):
        common = common_QKS.expand(-1, score.shape[1], -1).repeat(len(view.layers), 1, 1)
        shared.append(common if is_full else score)
    return shared
