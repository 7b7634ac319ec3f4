"""Images: the digits are whole, divided once and reproducible."""

import sys

import pytest
import torch

from common.errors import BackendError, ConfigError
from common.images import load_digits


def test_digits_are_divided_without_overlap():
    """Oracle: the published size of the set, its ranges, and the unshuffled original."""
    images = load_digits(0.25, seed=3)
    assert images.train_NI.shape == (1348, 64)
    assert images.val_NI.shape == (449, 64)
    pixels = torch.cat([images.train_NI, images.val_NI])
    assert pixels.min() == 0
    assert pixels.max() == 1
    original = load_digits(0.5, seed=4)
    same = torch.cat([original.train_NI, original.val_NI])
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, same.tolist()))
    assert torch.bincount(images.train_labels_N, minlength=10).min() > 100
    assert images.classes == 10


def test_digits_follow_their_seed():
    """Oracle: equal seeds give equal data, others do not."""
    assert torch.equal(load_digits(seed=1).val_NI, load_digits(seed=1).val_NI)
    assert not torch.equal(load_digits(seed=1).val_NI, load_digits(seed=2).val_NI)


def test_digits_say_what_they_need(monkeypatch):
    """Oracle: a share that leaves nothing, and a blocked import."""
    for share in (0.0, 0.6):
        with pytest.raises(ConfigError, match="val_fraction"):
            load_digits(share)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BackendError, match="pip install scikit-learn"):
        load_digits()
