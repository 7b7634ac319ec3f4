"""Durable files: atomic writes, staged directories, hashes, and a lock without a lock file.

What readers find under a final name is always complete: content is written beside it, flushed to
the disk and renamed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` and flush it to the disk; not atomic, for staged directories."""
    with path.open("wb") as stream:
        for start in range(0, len(data), _CHUNK_BYTES):
            stream.write(data[start : start + _CHUNK_BYTES])
        stream.flush()
        os.fsync(stream.fileno())


def to_json(value: Any) -> str:
    """Return ``value`` as indented JSON with a final newline; NaN and infinity are refused."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` atomically: an old file stays until the new is whole.

    Raises:
        OSError: when the disk is full or the folder is not writable; the old file is untouched.
        ValueError: when ``value`` holds NaN or infinity.
    """
    data = to_json(value).encode()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_bytes(staged, data)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush the files directly inside ``path`` and the directory itself to the disk."""
    for file in sorted(path.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(path)


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside ``final``; it is removed unless the caller renamed it.

    Raises:
        OSError: when the parent folder cannot be created or written.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.stage-", dir=final.parent))
    stage.chmod(0o755)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def directory_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an advisory lock on the directory ``path`` itself; file systems without it go unlocked.

    Args:
        path: An existing directory.
        shared: Readers share; a writer (the default) is alone.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_tree(path: Path) -> None:
    """Remove a directory, first renamed away so that no reader finds it half removed."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.stage-", dir=path.parent))
    try:
        path.replace(doomed)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)
