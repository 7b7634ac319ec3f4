"""Experiments that sweep: each value of each axis composes, and the number of cells is as said."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from common.config import build

CONF = Path(__file__).resolve().parents[2] / "conf" / "experiment"
SWEEPS = sorted(path.stem for path in CONF.glob("*.yaml") if "sweeper:" in path.read_text())
FRONTIERS = {
    "frontier_shakespeare": "frontier_shakespeare",
    "frontier_shakespeare_2lip": "frontier_shakespeare",
    "frontier_shakespeare_small": "frontier_shakespeare_small",
}
COMPARED = ("frontier_shakespeare", "frontier_shakespeare_small")


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield


def axes(name: str) -> dict[str, list[str]]:
    """Return the values of every axis of a sweep."""
    config = compose("train", overrides=[f"experiment={name}"], return_hydra_config=True)
    params = config.hydra.sweeper.params
    return {axis: str(values).split(",") for axis, values in params.items()}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_option_and_the_last_values_compose(name: str) -> None:
    """Oracle: Hydra, and the settings classes accepting what comes out."""
    choices = axes(name)
    last = {axis: values[-1] for axis, values in choices.items()}
    options = [(axis, value) for axis in choices for value in choices[axis] if not _number(value)]
    for axis, value in options or [("seed", "1")]:
        overrides = [f"{key}={text}" for key, text in (last | {axis: value}).items()]
        config = compose("train", overrides=[f"experiment={name}", *overrides])
        assert build(config.optim).lr > 0
        assert build(config.constraint).w_max > 0


def _number(text: str) -> bool:
    return re.fullmatch(r"[0-9.]+", text) is not None


@pytest.mark.parametrize("name", COMPARED)
def test_frontier_has_the_axes_of_the_paper(name: str) -> None:
    """Oracle: both optimizers, at least three caps, every matrix under the same cap."""
    choices = axes(name)
    assert len(choices["constraint.w_max"]) >= 3
    optimizers = set()
    for optim in choices["optim"]:
        config = compose("train", overrides=[f"experiment={name}", f"optim={optim}"])
        optimizers.add(build(config.optim).matrices)
        constraint = build(config.constraint)
        assert constraint.cap("head.weight") == constraint.cap("layers.0.mlp.up.weight")
    assert optimizers == {"muon", "adamw"}


@pytest.mark.parametrize("name", FRONTIERS)
def test_number_of_cells_is_as_described(name: str) -> None:
    """Oracle: the product of the axes against the number in the file's comment."""
    text = (CONF / f"{name}.yaml").read_text()
    cells = math.prod(len(values) for values in axes(name).values())
    assert re.search(rf"\b{cells} models\b", text), cells


@pytest.mark.parametrize(("name", "folder"), list(FRONTIERS.items()))
def test_a_repeated_sweep_finds_its_folder(name: str, folder: str) -> None:
    """Oracle: no time in the folder's name, and the data's path is not part of a cell's."""
    config = compose("train", overrides=[f"experiment={name}"], return_hydra_config=True)
    assert config.hydra.sweep.dir == f"runs/train/sweeps/{folder}"
    assert "data.path" in config.hydra.job.config.override_dirname.exclude_keys
