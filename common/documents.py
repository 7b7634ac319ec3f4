"""Documents of a source as UTF-8 bytes, in a fixed order: all at once, or with a position.

Local text is read as it is; tables and hub data sets come through ``datasets`` as streams, so that
memory holds no more than a piece or a row. A stored position continues an interrupted reading.
"""

import glob
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from common.errors import BackendError, DataError
from common.hub import datasets_library, require_host
from common.sources import Files, Hub, TextChecker, readable

PIECE_BYTES = 1 << 20
"""Plain text is streamed in pieces of about this size, cut at line ends."""


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
        for row in open_rows(source):
            yield checked_text(row, column, where)
    except (DataError, BackendError):
        raise
    except Exception as error:  # datasets raises classes of its own for damaged tables
        raise unreadable(source, error) from error


def checked_text(row: Any, column: str, where: str) -> str:
    """Return the text in ``column`` of a row; ``DataError`` lists the columns there are."""
    if column not in row:
        found = ", ".join(row)
        raise DataError(f"{where}: no column {column!r}, found {found}; set data.column")
    if not isinstance(row[column], str | None):
        raise DataError(
            f"{where}: column {column!r} holds {type(row[column]).__name__}, expected text; set "
            "data.column"
        )
    return row[column] or ""


def unreadable(source: Files | Hub, error: Exception) -> DataError:
    """Return what to say about a table or hub data set that ``datasets`` cannot read."""
    text = getattr(error, "strerror", None) or str(error)
    reason = (text.splitlines() or [type(error).__name__])[0][:200]
    if isinstance(source, Hub):
        return DataError(
            f"hub data set {source.name!r} cannot be read ({reason}); give a local copy with "
            "data.path=FILE (text, jsonl or parquet)"
        )
    return DataError(f"{source.paths[0]}: cannot be read ({reason}); rewrite the file")


def open_rows(source: Files | Hub) -> Any:
    """Return the rows of a source as a streaming ``datasets.IterableDataset``.

    Raises:
        BackendError: when ``datasets`` is not installed.
    """
    datasets = datasets_library("reading a corpus")
    if isinstance(source, Hub):
        require_host(datasets.config.HF_ENDPOINT, offline=datasets.config.HF_HUB_OFFLINE)
        return datasets.load_dataset(
            source.name,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    if source.loader == "text":
        # The text loader would rewrite line ends; a generator keeps the file's bytes.
        names = [str(path) for path in source.paths]
        return datasets.IterableDataset.from_generator(_read_texts, gen_kwargs={"names": names})
    names = [glob.escape(str(path)) for path in source.paths]
    return datasets.load_dataset(source.loader, data_files=names, split="train", streaming=True)


def _read_texts(names: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        yield {"text": Path(name).read_bytes().decode("utf-8")}


class DocumentReader:
    """Documents in order, with a position after the last one that can be stored and continued from.

    Rows of tables are documents. Plain text comes in pieces of about ``PIECE_BYTES``; only the
    last piece of a file ends a document.

    Args:
        source: Files or a hub data set.
        column: Text column of local tables.
        position: Where an earlier reader was (``position`` of it), or None for the start.
    """

    def __init__(self, source: Files | Hub, column: str, position: dict[str, Any] | None = None):
        self.source, self.column = source, column
        self._start = position
        self._rows: Any = None
        self._file = self._offset = 0
        self._is_plain = isinstance(source, Files) and source.loader in ("text", "bytes")
        if self._is_plain and position is not None:
            self._file, self._offset = position["file"], position["offset"]

    @property
    def position(self) -> dict[str, Any]:
        """Plain JSON values that say where the next document starts."""
        if self._is_plain:
            return {"file": self._file, "offset": self._offset}
        return {"rows": self._rows.state_dict()} if self._rows is not None else {}

    def __iter__(self) -> Generator[tuple[bytes, bool], None, None]:
        """Yield text and whether a document ends with it; empty texts are left out.

        Raises:
            DataError: for missing columns, unreadable files or tables, or an unreachable hub.
            BackendError: when ``datasets`` is needed and not installed.
        """
        return self._pieces() if self._is_plain else self._table()

    def _pieces(self) -> Generator[tuple[bytes, bool], None, None]:
        assert isinstance(self.source, Files)
        is_text = self.source.loader == "text"
        while self._file < len(self.source.paths):
            path = self.source.paths[self._file]
            with readable(path), path.open("rb") as stream:
                stream.seek(self._offset)
                checker = TextChecker(path, self._offset)
                while piece := stream.read(PIECE_BYTES):
                    # The rest of the line: a piece never ends inside one, or inside a character.
                    piece += stream.readline() if is_text else b""
                    if is_text:
                        checker.add(piece)
                    self._offset += len(piece)
                    is_last = stream.peek(1) == b""
                    if is_last:
                        checker.end()
                        self._file, self._offset = self._file + 1, 0
                    yield piece, is_last
                    if is_last:
                        break
                else:
                    self._file, self._offset = self._file + 1, 0

    def _table(self) -> Generator[tuple[bytes, bool], None, None]:
        source = self.source
        column = source.column if isinstance(source, Hub) else self.column
        where = source.name if isinstance(source, Hub) else str(source.paths[0])
        try:
            self._rows = open_rows(source)
            if self._start:
                self._rows.load_state_dict(self._start["rows"])
            for row in self._rows:
                text = checked_text(row, column, where)
                if text:
                    yield text.encode("utf-8", errors="replace"), True
        except (DataError, BackendError):
            raise
        except Exception as error:  # datasets raises classes of its own for damaged tables
            raise unreadable(source, error) from error
