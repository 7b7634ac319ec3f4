"""Serving with a compressed KV cache."""
