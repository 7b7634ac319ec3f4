"""From configuration nodes to validated settings objects.

Settings are frozen dataclasses; YAML carries their ``_target_``. The functions here turn every
mistake in a node (unknown key, wrong type, impossible value) into one ``ConfigError``.
"""

import dataclasses
import math
import re
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.errors import ConfigError, LipError

# How Python and Hydra word it when a target does not know a key of its node.
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
_KEY = re.compile(r"^full_key: (\S+)$", re.MULTILINE)


def build(node: Any, **overrides: Any) -> Any:
    """Instantiate the ``_target_`` of a configuration node.

    Args:
        node: Mapping with ``_target_`` (a plain dict or a ``DictConfig``).
        **overrides: Keyword arguments that win over the node's own.

    Returns:
        The object; lists in the node arrive as plain lists.

    Raises:
        ConfigError: for an unknown target or argument; any ``LipError`` of the target as it is.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(node, _convert_="all", **overrides)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LipError):
            cause = cause.__cause__
        if isinstance(cause, LipError):
            raise _named_by_key(cause, node) from None
        if unknown := _UNKNOWN.search(str(error)):
            group = f"{found[1]}." if (found := _KEY.search(str(error))) else ""
            raise ConfigError(
                f"{group}{unknown[1]}: unknown setting; remove it or correct its name"
            ) from None
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ConfigError("; ".join(lines[1:3] or lines)) from error


def _named_by_key(error: LipError, node: Any) -> LipError:
    """Call a setting what the command line calls it, where a type error names its class."""
    key = node._get_full_key("") if hasattr(node, "_get_full_key") else ""
    name, text = f"{str(node.get('_target_')).rpartition('.')[2]}.", str(error)
    if not key or not text.startswith(name):
        return error
    return type(error)(f"{key}.{text.removeprefix(name)}")


def check_types(settings: Any, *, prefix: str | None = None) -> None:
    """Check the fields of a frozen dataclass against their annotations, converting int to float.

    Call it first in ``__post_init__``. Lists become tuples where a tuple is declared.

    Args:
        settings: The dataclass.
        prefix: Put before a field's name in messages; the class and a dot when omitted.

    Raises:
        ConfigError: naming the field, its value and the declared type.
    """
    hints = get_type_hints(type(settings))
    prefix = f"{type(settings).__name__}." if prefix is None else prefix
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        converted = _convert(value, hints[field.name])
        if converted is _MISMATCH:
            kind = getattr(hints[field.name], "__name__", None) or str(hints[field.name])
            if get_origin(hints[field.name]) is not None:
                kind = str(hints[field.name]).replace("typing.", "")
            if get_origin(hints[field.name]) is Literal:
                kind = "one of " + ", ".join(map(str, get_args(hints[field.name])))
            raise ConfigError(f"{prefix}{field.name}={value!r}: expected {kind}; correct it")
        if converted is not value:
            object.__setattr__(settings, field.name, converted)


def positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise ``ConfigError`` unless ``value`` is finite and positive (or zero where allowed)."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        bound = "at least 0" if zero else "above 0"
        raise ConfigError(f"{name}={value}: expected a finite number {bound}; correct it")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ``ConfigError`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}: expected {low} to {high}; correct it")


def one_of(name: str, value: Any, options: Collection[Any]) -> None:
    """Raise ``ConfigError`` unless ``value`` is among ``options``, listing them."""
    if value not in options:
        known = ", ".join(str(option) for option in options)
        raise ConfigError(f"{name}={value!r}: expected one of {known}")


_MISMATCH = object()


def _convert(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return value if value in args else _MISMATCH
    if origin is tuple:
        return _convert_tuple(value, args)
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (value if isinstance(value, float) else float(value)) if is_number else _MISMATCH
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _MISMATCH
    if origin is not None:
        return value if isinstance(value, origin) else _MISMATCH
    if hint is None or hint is type(None):
        return None if value is None else _MISMATCH
    return value if isinstance(value, hint) else _MISMATCH


def _convert_union(value: Any, args: tuple[Any, ...]) -> Any:
    # An exact member wins, so that an int stays an int in "int | float".
    for arg in args:
        if isinstance(arg, type) and type(value) is arg:
            return value
    for arg in args:
        converted = _convert(value, arg)
        if converted is not _MISMATCH:
            return converted
    return _MISMATCH


def _convert_tuple(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        return _MISMATCH
    if len(args) == 2 and args[1] is Ellipsis:
        hints = (args[0],) * len(value)
    elif len(args) == len(value):
        hints = args
    else:
        return _MISMATCH
    items = tuple(_convert(item, hint) for item, hint in zip(value, hints, strict=True))
    if any(item is _MISMATCH for item in items):
        return _MISMATCH
    return items
