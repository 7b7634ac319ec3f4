"""Hydra configurations; the package exists so that ``pkg://conf`` resolves."""
