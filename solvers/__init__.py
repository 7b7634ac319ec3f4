"""Monotone inclusions, and the sound Lipschitz bounds built on them."""
