"""From an exception to the one line that a user needs: the value, the expectation, the remedy."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from common.cli import COMMAND_VARIABLE
from common.errors import LipError

_FOLDER_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EACCES: "permission denied: choose a folder that you may write to (hydra.run.dir=DIR)",
    errno.EPERM: "not permitted: choose a folder that you may write to (hydra.run.dir=DIR)",
    errno.EROFS: "the file system is read-only: choose another folder (hydra.run.dir=DIR)",
    errno.ENOTDIR: "a part of the path is a file: choose another folder (hydra.run.dir=DIR)",
    errno.EEXIST: "a file is in the way: choose another folder (hydra.run.dir=DIR)",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one (hydra.run.dir=DIR)",
}


def explain(error: BaseException) -> str | None:
    """Return one line that says what the user can do about ``error``.

    Args:
        error: Any exception.

    Returns:
        The line, without the program's name; None if the error is a defect of the program, for
        which a traceback serves better.
    """
    for cause in _causes(error):
        if isinstance(cause, LipError):
            return _one_line(str(cause))
    line = _configuration(error) or _system(error)
    return None if line is None else _one_line(line)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _system(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
        # Of a copy or a rename the second name is what was being written.
        return f"{error.filename2 or error.filename or 'output'}: {_FOLDER_ERRORS[error.errno]}"
    text = str(error)
    if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
        return f"output: {_FOLDER_ERRORS[errno.ENOSPC]}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: use a smaller model, batch or context"
    return None


def _configuration(error: BaseException) -> str | None:
    if not (type(error).__module__ or "").startswith(("hydra", "omegaconf")):
        return None
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf import errors as omega

    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: expected key=value; quote special characters"
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, omega.MissingMandatoryValue):
        key = getattr(error, "full_key", None) or str(error).rpartition(" ")[2]
        return f"{key} is not set: add {key}=VALUE"
    _, is_ours, reason = str(error).partition("ConfigError raised while resolving interpolation: ")
    if is_ours:
        return reason.splitlines()[0]
    if isinstance(error, omega.InterpolationResolutionError | omega.ValidationError):
        return f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}: correct it"
    if isinstance(error, HydraException):
        return _composition(error)
    deleted = [argument for argument in sys.argv[1:] if argument.startswith("~")]
    if deleted and isinstance(error, omega.ConfigAttributeError | omega.ConfigKeyError):
        return f"{deleted[0]}: this command needs that key: remove the override"
    return None


def _composition(error: BaseException) -> str:
    text = str(error)
    unknown = re.match(r"Could not override '([^']*)'", text)
    if unknown is not None:
        return _unknown_key(unknown.group(1))
    cause = error.__cause__
    detail = "" if cause is None else f": {str(cause).splitlines()[0]}"
    return f"{text.splitlines()[0]}{detail}: correct it"


def _unknown_key(key: str) -> str:
    if not key:
        return "an override has no key: expected key=value"
    known = list(_known_keys())
    if key in known:
        return (
            f"{key!r} gets a key that it does not list: add it with +{key}.NAME=VALUE, or where "
            f"NAME has dots with '+{key}={{NAME: VALUE}}'"
        )
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "--cfg job lists what can be set"
    return f"unknown key {key!r}: {hint}"


def _unknown_option(error: Any) -> str:
    text = str(error)
    if error.missing_cfg_file is None or not error.options:
        return text
    group, _, option = str(error.missing_cfg_file).removesuffix(".yaml").rpartition("/")
    options = sorted(error.options)
    if not group:
        return f"configuration {option!r} not found: expected one of {', '.join(options)}"
    near = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{group}={option}: expected one of {', '.join(options)}{hint}"


def _known_keys() -> Iterator[str]:
    """Yield the dotted keys of the command's configuration, with the chosen group options."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    command = os.environ.get(COMMAND_VARIABLE, "")
    chosen = [a for a in sys.argv[1:] if re.fullmatch(r"[a-z_/]+=[a-z0-9_]+", a)]
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        for overrides in (chosen, []):
            try:
                config = compose(command, overrides=overrides)
            except HydraException:
                continue
            yield from _dotted(config, "")
            return


def _dotted(node: Any, prefix: str) -> Iterator[str]:
    from omegaconf import DictConfig

    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _dotted(child, f"{prefix}{key}.")
