"""The rows of a bench: written one by one, so that a stopped bench goes on where it was."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import write_json
from common.reporting.runs import read_json

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FILE = "bench.json"


class Rows:
    """Rows of one file, each known by its part and keys.

    Args:
        path: The file; made when absent.
        identity: Everything the rows depend on besides their keys.

    Raises:
        DataError: if the file has rows of another model, text or settings.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        text = json.dumps(identity, sort_keys=True, default=str)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "rows": [],
        }
        if path.exists():
            stored = read_json(path)
            if not isinstance(stored, dict) or stored.get("identity") != self.identity:
                raise DataError(
                    f"{path}: rows of another model, text or settings; choose another "
                    "hydra.run.dir or set force=true, which makes all rows again"
                )
            self.content = stored

    def __iter__(self) -> Any:
        """Iterate over the rows in the order in which they were made."""
        return iter(self.content["rows"])

    def make(self, part: str, keys: Mapping[str, Any], measure: Callable[[], dict]) -> None:
        """Measure a row unless it is there already, and write it.

        Args:
            part: Part of the bench.
            keys: What tells the row from others of the part.
            measure: Returns its figures.
        """
        if any(row["part"] == part and keys.items() <= row.items() for row in self):
            return
        row = {"part": part, **keys, **measure()}
        self.content["rows"].append(row)
        write_json(self.path, self.content)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in row.items())
        log.info("bench: %s", shown)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
