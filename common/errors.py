"""The exception tree: every error a user can cause derives from ``LipError``.

A message is one line that names the value, what was expected and the remedy; the command line
prints it and exits with status 2.
"""


class LipError(Exception):
    """Base class of all errors raised on purpose; never raised itself."""


class ConfigError(LipError, ValueError):
    """A value the user set is impossible."""


class ShapeError(LipError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class DataError(LipError, ValueError):
    """A corpus, a text or a prompt cannot be used."""


class BundleError(LipError, RuntimeError):
    """A model directory is missing, damaged or of a foreign version."""


class CertificateError(LipError, RuntimeError):
    """A certificate is void, violated or cannot be derived."""


class ConvergenceError(LipError, RuntimeError):
    """A solver stopped without meeting its tolerance."""


class BackendError(LipError, RuntimeError):
    """A backend or an optional dependency was asked for but is not available."""
