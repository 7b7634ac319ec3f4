"""Where text comes from: files found, checked and hashed, or a data set on the hub.

Nothing here needs ``datasets``, so that a prepared corpus opens without importing it;
``common.documents`` reads what is found here.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import DataError

# Test suites, vendored tools and installed packages are not the library's own text.
_STDLIB_EXCLUDED = frozenset(
    """test tests idle_test idlelib lib2to3 turtledemo ensurepip
    site-packages dist-packages __pycache__""".split()  # noqa: SIM905
)
_AS_BYTES = "for raw bytes use data.source=bytes data.tokenizer=byte"
_CHUNK_BYTES = 1 << 20
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Local files of one kind.

    Attributes:
        root: Folder that the names are relative to.
        paths: The files, in reading order.
        loader: The ``datasets`` loader: text, json, parquet, arrow; or ``bytes`` (read as is).
    """

    root: Path
    paths: tuple[Path, ...]
    loader: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hub:
    """A data set on the Hugging Face hub: repository, subset, text column, split and revision."""

    name: str
    subset: str | None = None
    column: str = "text"
    split: str = "train"
    revision: str | None = None


HUB_CORPORA = {
    "shakespeare": Hub(name="Trelis/tiny-shakespeare", column="Text"),
    "wikitext": Hub(name="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
    "fineweb": Hub(name="HuggingFaceFW/fineweb", subset="sample-10BT"),
    "fineweb_edu": Hub(name="HuggingFaceFW/fineweb-edu", subset="sample-10BT"),
}


def stdlib_files() -> Files:
    """Return the sources (``*.py``) of the running interpreter's standard library.

    Left out: test suites, idlelib, lib2to3, turtledemo, ensurepip, site-packages, and the few
    files that are not UTF-8. In a virtual environment this is the base interpreter's library.

    Raises:
        DataError: when the library has no source files (a stripped or zipped installation).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _STDLIB_EXCLUDED)
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    paths = tuple(path for path in found if _is_utf8(path))
    if not paths:
        raise DataError(
            f"standard library {root}: expected .py files, found none; give another corpus with "
            "data.source=local data.path=FILE"
        )
    return Files(root=root, paths=paths, loader="text")


def local_files(path: Path, *, as_bytes: bool) -> Files:
    """Return the file, or the files below the directory, at ``path``, sorted by name.

    Hidden files are left out. The kind follows from the suffix: .parquet, .jsonl, .json, .arrow,
    anything else is text.

    Raises:
        DataError: when nothing is there, it is empty, unreadable, or of mixed kinds.
    """
    if not path.exists():
        raise DataError(f"data.path={path}: no such file or directory; correct the path")
    if path.is_file():
        root, paths = path.parent, [path]
    else:
        root = path
        names = (file.relative_to(root) for file in path.rglob("*") if file.is_file())
        paths = [root / name for name in names if not any(p[0] == "." for p in name.parts)]
        # A folder written by save_to_disk keeps its description beside the tables.
        if any(file.suffix == ".arrow" for file in paths):
            paths = [file for file in paths if file.suffix == ".arrow"]
        paths.sort(key=lambda file: file.relative_to(root).as_posix())
    with readable(path):
        if not any(file.stat().st_size for file in paths):
            what = "the file is empty" if path.is_file() else "the folder holds no text"
            raise DataError(f"data.path={path}: {what}; give a file with text")
    loaders = sorted({_LOADERS.get(file.suffix, "text") for file in paths})
    if as_bytes:
        loaders = ["bytes"]
    if len(loaders) > 1:
        raise DataError(
            f"data.path={path}: the folder mixes {' and '.join(loaders)} files; give a folder or "
            "file of one kind"
        )
    return Files(root=root, paths=tuple(paths), loader=loaders[0])


def content_sha256(files: Files) -> str:
    """Return one sha256 (hex) over names and contents, checking text on the way.

    Raises:
        DataError: for unreadable files, and for text files that hold NUL or non-UTF-8 bytes.
    """
    digest = hashlib.sha256(files.loader.encode())
    for path in files.paths:
        name = path.relative_to(files.root).as_posix()
        with readable(path), path.open("rb") as stream:
            digest.update(f"\0{name}\0{os.fstat(stream.fileno()).st_size}\0".encode())
            checker = TextChecker(path) if files.loader == "text" else None
            while chunk := stream.read(_CHUNK_BYTES):
                if checker is not None:
                    checker.add(chunk)
                digest.update(chunk)
            if checker is not None:
                checker.end()
    return digest.hexdigest()


def files_stamp(files: Files) -> list[list[Any]]:
    """Return name, size and modification time (ns) of every file: their state, without reading."""
    stamp = []
    for path in files.paths:
        with readable(path):
            facts = path.stat()
        name = path.relative_to(files.root).as_posix()
        stamp.append([name, facts.st_size, facts.st_mtime_ns])
    return stamp


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about a file of the corpus into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"data.path={path}: cannot be read ({reason}); check it") from None


class TextChecker:
    """Checks a file's bytes piece by piece: UTF-8 without NUL.

    Args:
        path: For messages.
        offset: Where in the file the first piece starts, between two characters.
    """

    def __init__(self, path: Path, offset: int = 0):
        self.path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._offset = offset

    def add(self, data: bytes) -> None:
        """Check the next bytes; ``DataError`` with the offset of the first bad one."""
        position = data.find(b"\0")
        if position >= 0:
            what = f"NUL byte at offset {self._offset + position}, not a text file"
            raise DataError(f"{self.path}: {what}; {_AS_BYTES}")
        self._decode(data, final=False)
        self._offset += len(data)

    def end(self) -> None:
        """Check that the text does not end inside a character."""
        self._decode(b"", final=True)

    def _decode(self, data: bytes, *, final: bool) -> None:
        pending = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: byte {error.object[error.start]:#04x} at offset "
                f"{self._offset - pending + error.start} is not UTF-8 text; {_AS_BYTES}"
            ) from None


def _is_utf8(path: Path) -> bool:
    checker = TextChecker(path)
    try:
        checker.add(path.read_bytes())
        checker.end()
    except (DataError, OSError):
        return False
    return True
