"""The training text of a task as a file, written once per settings."""

import hashlib
import json
from pathlib import Path

from common import files
from common.errors import DataError
from common.sources import Files
from common.tasks.base import Task

# Part of the file's name: to be raised when a generator changes what it writes.
FORMAT_VERSION = 2


def training_text(task: Task, size: int) -> str:
    """Return whole documents of a task, together at least ``size`` characters."""
    texts, length = [], 0
    for text in task.documents():
        texts.append(text)
        length += len(text)
        if length >= size:
            break
    return "".join(texts)


def task_files(task: Task, size: int, cache: Path) -> Files:
    """Return the training text of a task as a file below ``cache``, writing it where missing.

    Args:
        task: What to generate.
        size: Characters, at least; the last document is whole.
        cache: Directory of generated and prepared text.

    Raises:
        DataError: when the cache cannot be written.
    """
    parts = {"version": FORMAT_VERSION, "size": size, "task": files.plain(task)}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache / "tasks" / f"{task.name}-{digest[:16]}.txt"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_bytes(path, training_text(task, size).encode("ascii"))
        except OSError as error:
            raise DataError(
                f"data.cache={cache}: cannot write the text of task {task.name} "
                f"({error.strerror or error}); free space or set data.cache=DIR"
            ) from None
    return Files(root=path.parent, paths=(path,), loader="text")
