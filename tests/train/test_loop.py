"""Which accelerator and devices a training run gets."""

import os

import pytest
import torch

from common.errors import ConfigError
from train.loop import LAUNCHERS, accelerator_and_devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch report two CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)


@pytest.mark.parametrize(
    ("device", "devices", "expected"),
    [
        ("cpu", 3, ("cpu", 3)),
        ("auto", 2, ("cuda", 2)),
        ("cuda", "auto", ("cuda", "auto")),
        ("cuda:1", 1, ("cuda", [1])),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_devices_are_those_asked_for(device, devices, expected):
    """Oracle: written out."""
    assert accelerator_and_devices(device, devices) == expected


@pytest.mark.parametrize(
    ("device", "devices"), [("auto", 9), ("cuda", 3), ("cuda:1", 2), ("cpu", 9)]
)
@pytest.mark.usefixtures("two_gpus")
def test_more_devices_than_there_are_is_a_config_error(device, devices):
    """One line that names the value and the remedy, before Lightning is asked."""
    with pytest.raises(ConfigError, match=rf"trainer\.devices={devices}: .*; use "):
        accelerator_and_devices(device, devices)


def test_auto_without_a_gpu_is_the_cpu(monkeypatch):
    """The same choice as in every other command."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator_and_devices("auto", 1) == ("cpu", 1)


def test_several_nodes_need_a_launcher(monkeypatch):
    """Without one every node would wait for the others; torchrun's variable lets it pass."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: .*; use torchrun"):
        accelerator_and_devices("cpu", 1, 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert accelerator_and_devices("cpu", 1, 2) == ("cpu", 1)
