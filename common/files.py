"""Durable files: atomic writes, staged directories, hashes, and a lock without a lock file.

What readers find under a final name is always complete: content is written beside it, flushed to
the disk and renamed.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError

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


def plain(value: Any) -> Any:
    """Return a value as plain JSON types: dataclasses by field, infinity as ``inf``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def from_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; a key that an object gives twice is a ``ValueError``.

    Readers disagree about which of two values counts, so a file must not show one and use another.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return content


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path`` atomically: an old file stays until the new is whole.

    Raises:
        OSError: when the disk is full or the folder is not writable; the old file is untouched.
        DataError: when ``value`` holds NaN or infinity.
    """
    try:
        data = to_json(value).encode()
    except ValueError as error:
        raise DataError(
            f"{path.name}: a figure is NaN or infinite, expected finite ones: the model's weights "
            "are too large; train it again under a constraint"
        ) from error
    replace_bytes(path, data)


def replace_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically; ``OSError`` leaves the old file and nothing else."""
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
    """Yield an empty directory beside ``final``; it is removed unless the caller renames it.

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
    """Hold an advisory lock on the directory at ``path``, across its replacement by another.

    Args:
        path: An existing directory; the lock is on itself, so nothing is left behind.
        shared: Readers share; a writer (the default) is alone.

    Raises:
        OSError: when there is no such directory.
    """
    while True:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Some network file systems cannot lock: they go unlocked.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), path.stat()):
                yield
                return
        finally:
            os.close(handle)


def swap_directory(stage: Path, final: Path) -> None:
    """Put the finished directory ``stage`` at ``final``; an old one goes only after that.

    A crash in between leaves the old directory under ``backup_path``, see ``recover_directory``.
    """
    sync_tree(stage)
    backup = backup_path(final)
    if final.exists():
        shutil.rmtree(backup, ignore_errors=True)
        final.replace(backup)
    try:
        stage.replace(final)
    except BaseException:
        if backup.exists() and not final.exists():
            backup.replace(final)
        raise
    # Old or new, each is whole: a failed flush of the swap itself changes nothing.
    with contextlib.suppress(OSError):
        sync_directory(final.parent)
    shutil.rmtree(backup, ignore_errors=True)


def backup_path(final: Path) -> Path:
    """Return where ``swap_directory`` keeps the old directory while it works."""
    return final.with_name(f".{final.name}.backup")


def recover_directory(final: Path) -> None:
    """Bring back the old directory when a crash fell into the middle of ``swap_directory``."""
    # The root of a file system has no name to make a backup's of, but it exists.
    if final.exists() or not (backup := backup_path(final)).is_dir():
        return
    # A swap in progress holds the lock of what is now the backup: wait for it, then look again.
    with contextlib.suppress(FileNotFoundError), directory_lock(backup):
        if not final.exists():
            backup.replace(final)


def remove_tree(path: Path) -> None:
    """Remove a directory, first renamed away so that no reader finds it half removed."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.stage-", dir=path.parent))
    try:
        path.replace(doomed)
    finally:
        shutil.rmtree(doomed, ignore_errors=True)
