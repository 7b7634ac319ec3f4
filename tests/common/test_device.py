"""The device setting: names, refusals, and what auto means."""

import pytest
import torch

from common.device import resolve_device
from common.errors import ConfigError


def test_auto_takes_cuda_when_there_is_one(monkeypatch):
    """Oracle: the availability torch reports."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:x", "cuda:99", ""])
def test_other_names_and_missing_devices_are_refused(name):
    """The message holds the setting."""
    with pytest.raises(ConfigError, match="device="):
        resolve_device(name)
