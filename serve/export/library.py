"""The optional package ``transformers``, with one error where it is missing or too old."""

from typing import Any

from common.errors import BackendError

OLDEST = (5, 4)
"""Masks and caches have had their present arguments since this version."""


def require_transformers() -> Any:
    """Return the module ``transformers``.

    Raises:
        BackendError: when it is not installed, or older than ``OLDEST``.
    """
    try:
        import transformers
    except ImportError:
        message = "export needs the package transformers: pip install 'lipllm[hf]'"
        raise BackendError(message) from None
    major, minor = transformers.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        raise BackendError(
            f"export: transformers {transformers.__version__} is installed, expected "
            f"{OLDEST[0]}.{OLDEST[1]} or later; pip install --upgrade transformers"
        )
    return transformers
