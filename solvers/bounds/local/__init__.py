"""Certificates around one token sequence: radii and Lipschitz bounds below the global ones."""
