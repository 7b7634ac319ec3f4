"""Settings: every mistake becomes one ConfigError that names field, value and expectation."""

from dataclasses import dataclass
from typing import Literal

import pytest
from omegaconf import OmegaConf

from common.config import build, check_types
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Settings:
    count: int = 1
    rate: float = 0.5
    name: str | None = None
    mode: Literal["a", "b"] = "a"
    sizes: tuple[float, ...] = ()
    either: int | float = 1

    def __post_init__(self):
        check_types(self)


def test_accepted_values_are_converted_to_the_declared_types():
    """Ints become floats, lists become tuples, unions keep an exact member."""
    settings = _Settings(rate=1, sizes=[1, 2.5], either=2)
    assert isinstance(settings.rate, float)
    assert settings.sizes == (1.0, 2.5)
    assert all(isinstance(size, float) for size in settings.sizes)
    assert isinstance(settings.either, int)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 1.5),
        ("count", True),
        ("count", "abc"),
        ("rate", "abc"),
        ("rate", None),
        ("name", 3),
        ("mode", "c"),
        ("sizes", 3),
        ("sizes", ["x"]),
    ],
)
def test_wrong_types_name_field_and_value(field, value):
    """The message holds the field and the offending value."""
    with pytest.raises(ConfigError, match=field) as error:
        _Settings(**{field: value})
    assert repr(value) in str(error.value)


def test_a_type_error_names_the_key_of_the_command_line():
    """Oracle: the key that the user typed, not the class behind it."""
    model = {"_target_": "common.models.ModelConfig", "vocab_size": 3, "width": "abc"}
    node = OmegaConf.create({"group": {"model": {**model, "layers": 1, "heads": 1, "context": 2}}})
    with pytest.raises(ConfigError, match=r"^group\.model\.width='abc': expected int"):
        build(node.group.model)


def test_build_passes_our_errors_through_and_wraps_unknown_keys():
    """Hydra's instantiation errors never reach the user as tracebacks."""
    target = "common.models.ModelConfig"
    shape = {"vocab_size": 3, "width": 4, "layers": 1, "heads": 1, "context": 2}
    assert build({"_target_": target, **shape}).width == 4
    assert build({"_target_": target, **shape}, width=8).width == 8
    with pytest.raises(ConfigError, match="width=-1"):
        build({"_target_": target, **shape, "width": -1})
    with pytest.raises(ConfigError, match=r"^nope: unknown setting; remove it"):
        build({"_target_": target, **shape, "nope": 1})
    node = OmegaConf.create({"group": {"_target_": target, **shape, "nope": 1}})
    with pytest.raises(ConfigError, match=r"^group\.nope: unknown setting; remove it"):
        build(node.group)
