"""Callbacks: what is on the disk when writing a checkpoint fails."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from train.callbacks import CHECKPOINT, Checkpoint


def test_full_disk_keeps_the_last_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """Oracle: the bytes that were there, after a writer that stops in the middle."""
    (tmp_path / CHECKPOINT).write_bytes(b"whole")

    def write_half(path: Path) -> None:
        path.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = SimpleNamespace(save_checkpoint=write_half, is_global_zero=True)
    with pytest.raises(OSError, match="No space"):
        Checkpoint(1, tmp_path).save(trainer)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(CHECKPOINT, b"whole")]
