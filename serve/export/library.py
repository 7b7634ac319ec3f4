"""The optional package ``transformers``, with one error where it is missing."""

from typing import Any

from common.errors import BackendError


def require_transformers() -> Any:
    """Return the module ``transformers``, which keeps its messages and bars to itself.

    Raises:
        BackendError: when it is not installed.
    """
    try:
        import transformers
    except ImportError:
        message = "export needs the package transformers: pip install 'lipllm[hf]'"
        raise BackendError(message) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
