"""Where text comes from: files found, checked and hashed, then read through ``datasets``.

A source is a list of files (or a hub name) and yields documents as UTF-8 bytes, in a fixed order.
Finding and hashing needs no ``datasets``, so that a prepared corpus opens without importing it.
"""

import contextlib
import dataclasses
import glob
import hashlib
import logging
import os
import socket
import sysconfig
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import BackendError, DataError

# Test suites, vendored tools and installed packages are not the library's own text.
_STDLIB_EXCLUDED = frozenset(
    """test tests idle_test idlelib lib2to3 turtledemo ensurepip
    site-packages dist-packages __pycache__""".split()  # noqa: SIM905
)
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
    """A data set on the Hugging Face hub: repository, subset, text column and split."""

    name: str
    subset: str | None = None
    column: str = "text"
    split: str = "train"


HUB_CORPORA = {
    "shakespeare": Hub(name="Trelis/tiny-shakespeare", column="Text"),
    "wikitext": Hub(name="Salesforce/wikitext", subset="wikitext-2-raw-v1"),
    "fineweb": Hub(name="HuggingFaceFW/fineweb-edu", subset="sample-10BT"),
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
    with _readable(path):
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
        with _readable(path):
            data = path.read_bytes()
        if files.loader == "text":
            _check_text(path, data)
        name = path.relative_to(files.root).as_posix()
        digest.update(f"\0{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def documents(source: Files | Hub, column: str, max_bytes: int | None) -> Iterator[bytes]:
    """Yield the documents of a source as UTF-8 bytes, exactly as stored, empty ones left out.

    Args:
        source: Files or a hub data set.
        column: Text column of local tables (parquet, jsonl).
        max_bytes: Stop after this many bytes, cutting the last document at a character.

    Raises:
        DataError: for missing columns, unreadable tables, or an unreachable hub.
        BackendError: when ``datasets`` is not installed.
    """
    if isinstance(source, Files) and source.loader == "bytes":
        rows: Iterator[bytes] = (path.read_bytes() for path in source.paths)
    else:
        rows = (text.encode("utf-8", errors="replace") for text in _rows(source, column))
    left = max_bytes
    for data in rows:
        if left is not None and len(data) >= left:
            cut = data[:left]
            is_text = not (isinstance(source, Files) and source.loader == "bytes")
            yield cut.decode("utf-8", errors="ignore").encode() if is_text else cut
            return
        if left is not None:
            left -= len(data)
        if data:
            yield data


def _rows(source: Files | Hub, column: str) -> Iterator[str]:
    if isinstance(source, Hub):
        column = source.column
    elif source.loader == "text":
        column = "text"
    where = source.name if isinstance(source, Hub) else str(source.paths[0])
    try:
        for row in _open(source):
            if column not in row:
                found = ", ".join(row)
                raise DataError(f"{where}: no column {column!r}, found {found}; set data.column")
            if not isinstance(row[column], str | None):
                raise DataError(
                    f"{where}: column {column!r} holds {type(row[column]).__name__}, expected "
                    "text; set data.column"
                )
            yield row[column] or ""
    except (DataError, BackendError):
        raise
    except Exception as error:  # datasets raises classes of its own for damaged tables
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if isinstance(source, Hub):
            raise DataError(
                f"hub data set {where!r} cannot be read ({reason}); give a local copy with "
                "data.path=FILE (text, jsonl or parquet)"
            ) from error
        raise DataError(f"{where}: cannot be read ({reason}); rewrite the file") from error


def _open(source: Files | Hub) -> Any:
    try:
        import datasets
    except ImportError:
        raise BackendError("reading a corpus needs datasets: pip install datasets") from None
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    if isinstance(source, Hub):
        _require_host(datasets.config)
        return datasets.load_dataset(source.name, source.subset, split=source.split, streaming=True)
    if source.loader == "text":
        # The text loader would rewrite line ends; a generator keeps the file's bytes.
        names = [str(path) for path in source.paths]
        return datasets.IterableDataset.from_generator(_read_texts, gen_kwargs={"names": names})
    names = [glob.escape(str(path)) for path in source.paths]
    return datasets.load_dataset(source.loader, data_files=names, split="train", streaming=True)


def _require_host(config: Any) -> None:
    # Without a name server the library would retry for half a minute, loudly.
    host = urllib.parse.urlsplit(config.HF_ENDPOINT).hostname
    if not config.HF_HUB_OFFLINE and not urllib.request.getproxies():
        socket.getaddrinfo(host, None)


def _read_texts(names: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        yield {"text": Path(name).read_bytes().decode("utf-8")}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"data.path={path}: cannot be read ({reason}); check it") from None


def _check_text(path: Path, data: bytes) -> None:
    remedy = "for raw bytes use data.source=bytes data.tokenizer=byte"
    position = data.find(b"\0")
    if position >= 0:
        raise DataError(f"{path}: NUL byte at offset {position}, not a text file; {remedy}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8 text; "
            f"{remedy}"
        ) from None


def _is_utf8(path: Path) -> bool:
    try:
        _check_text(path, path.read_bytes())
    except (DataError, OSError):
        return False
    return True
