"""Durable files: what a reader finds under a final name is complete."""

import dataclasses
import json
import math

import pytest

from common.errors import DataError
from common.files import plain, to_json, write_json


def test_write_json_replaces_whole_files_and_refuses_nan(tmp_path):
    """Oracle: the json module; a refused value leaves the old file and nothing beside it."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    with pytest.raises(DataError, match=r"a\.json: a figure is NaN"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two values."""

    low: float
    high: object


def test_plain_values_fit_into_json():
    """Oracle: the json module, which refuses infinity and knows no dataclass."""
    value = {"a": Pair(-math.inf, (1, Pair(0.5, None))), "b": [math.inf]}
    expected = {"a": {"low": "-inf", "high": [1, {"low": 0.5, "high": None}]}, "b": ["inf"]}
    assert json.loads(to_json(plain(value))) == expected
