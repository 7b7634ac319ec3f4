"""The rows of a bench: written one by one, so that a stopped bench goes on where it was."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import DataError
from common.files import write_json
from common.reporting.runs import read_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
FILE = "bench.json"
DIGITS = 16  # of a hash in a row


class Rows:
    """Rows of one file, each known by its part and keys.

    Args:
        path: The file; made when absent.
        identity: Everything the rows depend on besides their keys and dependencies.
        fresh: Begin without the file's rows; it is replaced by the first new row.

    Raises:
        DataError: if the file has rows of another model, text or settings.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        text = json.dumps([FORMAT_VERSION, identity], sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "rows": [],
        }
        if path.exists() and not fresh:
            stored = read_json(path)
            if not isinstance(stored, dict) or stored.get("identity") != self.identity:
                raise DataError(
                    f"{path}: rows of another model, text or settings; choose another "
                    "hydra.run.dir or set force=true, which makes all rows again"
                )
            self.content = stored

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows in the order in which they were made."""
        return iter(self.content["rows"])

    def make(
        self,
        part: str,
        keys: Mapping[str, Any],
        measure: Callable[[], Mapping[str, Any]],
        depends: Mapping[str, Any] | None = None,
    ) -> None:
        """Measure a row unless it is there already, and write it.

        Args:
            part: Part of the bench.
            keys: What tells the row from others of the part.
            measure: Returns its figures.
            depends: Hashes of what the figures depend on; a row with others is made again.
        """
        names, depends = {"part": part, **keys}, depends or {}
        rows = self.content["rows"]
        index = next((i for i, row in enumerate(rows) if names.items() <= row.items()), len(rows))
        if index < len(rows) and depends.items() <= rows[index].items():
            return
        if index < len(rows):
            changed = [name for name, value in depends.items() if rows[index].get(name) != value]
            log.info("bench: measured again, for its %s changed:", " and ".join(changed))
        row = {**names, **measure()}
        shown = ", ".join(f"{name} {_short(value)}" for name, value in row.items())
        row |= depends
        self.content["rows"] = [*rows[:index], row, *rows[index + 1 :]]
        write_json(self.path, self.content)
        log.info("bench: %s", shown)


def digest(value: Tensor | Mapping[str, Any] | None) -> str | None:
    """Return a short hash of a tensor, or of tensors and plain values by name; None for None."""
    if value is None:
        return None
    sha256 = hashlib.sha256()
    parts = value if isinstance(value, Mapping) else {"": value}
    for name in sorted(parts):
        part, content = parts[name], repr(parts[name]).encode()
        if isinstance(part, Tensor):
            content = part.detach().cpu().contiguous().numpy().tobytes()
            name = f"{name} {part.dtype} {tuple(part.shape)}"
        sha256.update(f"{name} {len(content)} ".encode() + content)
    return sha256.hexdigest()[:DIGITS]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
