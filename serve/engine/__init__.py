"""Continuous batching over a paged cache; requests, blocks and the scheduler need no torch."""
