"""Every primary configuration composes with every option of every group it lists."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from common.cli import COMMANDS
from common.config import build

CONF = Path(__file__).resolve().parents[2] / "conf"
NOT_A_GROUP = {"hydra", "experiment", "optional local"}


@cache
def _groups(command: str) -> dict[str, Any]:
    entries = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    listed = [item for entry in entries if isinstance(entry, dict) for item in entry.items()]
    return {group: option for group, option in listed if group not in NOT_A_GROUP}


def _cells() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield choices of one option per group that together reach every option of a command."""
    for command in COMMANDS:
        options = {
            group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
            for group in _groups(command)
        }
        for turn in range(max(map(len, options.values()), default=0)):
            yield command, {group: names[turn % len(names)] for group, names in options.items()}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield


@pytest.mark.parametrize("command", COMMANDS)
def test_primary_composes_with_the_shared_keys(command: str) -> None:
    """Oracle: the contract that every command has these keys."""
    config = compose(command)
    assert {"seed", "device", "name", "force"} <= set(config)


@pytest.mark.parametrize("command", COMMANDS)
def test_job_name_is_the_command(command: str) -> None:
    """Oracle: the run directory is named after the command."""
    assert compose(command, return_hydra_config=True).hydra.job.name == command


@pytest.mark.parametrize(("command", "chosen"), list(_cells()))
def test_options_compose(command: str, chosen: dict[str, str]) -> None:
    """Oracle: Hydra, and the settings class of each option accepting its own values."""
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    config = compose(command, overrides=overrides + ["++bundle=b"] * (command != "pipeline"))
    for group in chosen:
        if command == next(other for other in COMMANDS if group in _groups(other)):
            _build(config[group])


def _build(node: Any) -> None:
    target = None if node is None else node.get("_target_")
    is_settings = target is not None and dataclasses.is_dataclass(get_object(target))
    if is_settings and not any(OmegaConf.is_missing(node, str(key)) for key in node):
        build(node, **({"vocab_size": 256} if target.endswith("ModelConfig") else {}))


def test_every_group_belongs_to_a_command() -> None:
    """Oracle: the folders; an option that no command lists cannot be reached."""
    known = {group for command in COMMANDS for group in _groups(command)}
    folders = {path.parent.name for path in CONF.glob("*/*.yaml")}
    assert folders - {"hydra", "experiment", "local"} <= known


def test_pipeline_covers_the_keys_of_its_stages() -> None:
    """Oracle: the union of the stages' keys is the pipeline's configuration."""
    config = compose("pipeline")
    for stage in config.pipeline.stages:
        assert set(stage["keys"]) <= set(config)


def test_pipeline_lists_every_group_of_its_commands() -> None:
    """Oracle: the primaries of the stages' commands."""
    stages = ("train", "certify", "compress", "calibrate", "generate", "report")
    needed = {group for command in stages for group in _groups(command)}
    assert needed <= set(_groups("pipeline"))


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("command", ["train", "pipeline"])
def test_experiment_composes(command: str, path: Path) -> None:
    """Oracle: the overlay's own values win over those of the groups."""
    overlay = yaml.safe_load(path.read_text())
    config = compose(command, overrides=[f"experiment={path.stem}"])
    for group, values in overlay.items():
        if group not in ("defaults", "hydra") and isinstance(values, dict):
            chosen = OmegaConf.to_container(config[group], resolve=True)
            assert _contains(chosen, values)


def _contains(chosen: Any, values: Any) -> bool:
    """Whether all values are chosen; groups may list more keys of a mapping."""
    if isinstance(values, str) and values.startswith("${"):
        return True
    if isinstance(values, dict):
        return all(key in chosen and _contains(chosen[key], value) for key, value in values.items())
    return chosen == values
