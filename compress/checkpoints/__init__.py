"""Checkpoints of ``transformers``: ordinary ones, and pruned ones with a manifest."""
