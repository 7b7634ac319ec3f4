"""Counters of one engine since its start; no torch."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class EngineStats:
    """What has happened so far; every field only grows.

    Attributes:
        prompt_tokens: Prompt tokens of admitted requests.
        generated_tokens: Tokens sampled.
        prefix_queries: Tokens looked up in the prefix cache.
        prefix_hits: Tokens found there.
        preemptions: Sequences put back to be recomputed.
        compactions: Caches cut to their budget.
        evicted_tokens: Cache slots given up by them, per layer and head.
        reclaimed_blocks: Blocks given back by them.
        corrupted_requests: Requests ended because their logits were not finite.
        failed_steps: Steps ended by an exception.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    compactions: int = 0
    evicted_tokens: int = 0
    reclaimed_blocks: int = 0
    corrupted_requests: int = 0
    failed_steps: int = 0
