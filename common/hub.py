"""The hub of data sets and models: its library, and whether it can be reached at all."""

import logging
import socket
import urllib.parse
import urllib.request
from typing import Any

from common.errors import BackendError


def datasets_library(purpose: str) -> Any:
    """Return the module ``datasets``, which keeps its messages and bars to itself from now on.

    Args:
        purpose: What needs it, for the message.

    Raises:
        BackendError: when it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise BackendError(f"{purpose} needs datasets: pip install datasets") from None
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def require_host(endpoint: str, *, offline: bool) -> None:
    """Raise ``OSError`` at once where the hub's name cannot be resolved.

    Without a name server its library would retry for half a minute, loudly.
    """
    if not offline and not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)
