"""From a stream of documents to the token memory map, in bounded memory and resumable.

Ids are appended shard by shard; after each one the position in the stream is stored, so that an
interrupted preparation continues there and ends with the same bytes as an uninterrupted one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from common import files
from common.documents import DocumentReader
from common.errors import DataError
from common.packing import FORMAT_VERSION, count_entropy_bits, token_dtype
from common.tokenizer import Tokenizer, tokenizer_sha256

log = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 24
"""Ids after which a shard is closed: what an interruption can cost."""
BATCH_BYTES = 1 << 20
"""Text encoded at once: with the longest document, all that is ever in memory."""

_STATE = "progress.json"
_SPLITS = ("train", "val")
_LOG_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """What a preparation writes where.

    Attributes:
        directory: Final place of the corpus.
        open: Returns the reader of the documents from a stored position (None: the start).
        tokenizer: Encodes them.
        val_fraction: Share of the documents held out, by the hash of their text.
        max_tokens: Stop when the training part holds so many ids, or None.
        max_bytes: Stop after the document with which so many bytes have been read, or None.
        is_text: Whether documents end with the tokenizer's end of document, or a newline.
    """

    directory: Path
    open: Callable[[dict[str, Any] | None], DocumentReader]
    tokenizer: Tokenizer
    val_fraction: float
    max_tokens: int | None = None
    max_bytes: int | None = None
    is_text: bool = True


@dataclasses.dataclass(kw_only=True, slots=True)
class _State:
    """What is on the disk, as plain JSON values; counts are of documents, ids and bytes."""

    position: dict[str, Any] | None = None
    documents: int = 0
    held_out: int = 0
    train_tokens: int = 0
    val_tokens: int = 0
    train_bytes: int = 0
    val_bytes: int = 0
    byte_counts: list[int] = dataclasses.field(default_factory=lambda: [0] * 256)
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def prepare_stream(plan: StreamPlan) -> None:
    """Write ``tokens.bin``, ``tokenizer.json`` and ``meta.json`` of a streamed corpus.

    An unfinished preparation beside the final place is continued; several processes wait for the
    one that works.

    Raises:
        DataError: for unreadable text, or when nothing was held out or left to train on.
        OSError: when the cache cannot be written; what is there can be continued.
    """
    partial = partial_path(plan.directory)
    while not plan.directory.is_dir():
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(files.directory_lock(partial))
            except FileNotFoundError:
                continue  # the one that held the lock has renamed it to its final place
            if not plan.directory.is_dir():
                _Preparation(plan, partial).run()


def partial_path(directory: Path) -> Path:
    """Return where a preparation works until it is finished."""
    return directory.with_name(f"{directory.name}.partial")


class _Preparation:
    def __init__(self, plan: StreamPlan, folder: Path):
        self.plan, self.folder = plan, folder
        self.dtype = token_dtype(plan.tokenizer.vocab_size)
        self.state = self._restore()
        self._hashes = {name: hashlib.sha256() for name in (*_SPLITS, "text")}
        self._since = dict.fromkeys(_SPLITS, 0)
        self._progress = _Progress(plan, self.state)

    def run(self) -> None:
        """Continue to the end of the stream or the budget, then put everything in place."""
        try:
            self._read()
        except DataError as error:
            if not self.state.shards:
                raise
            done = self.state.shards[-1]["documents"]
            raise DataError(
                f"{error}; {done} documents are prepared: the same command continues there"
            ) from error
        self._finish()

    def _read(self) -> None:
        reader = self.plan.open(self.state.position)
        with contextlib.ExitStack() as stack:
            outputs = {
                split: stack.enter_context((self.folder / f"{split}.bin").open("ab"))
                for split in _SPLITS
            }
            stack.enter_context(self._progress)
            # A stream left open would be torn down noisily at exit.
            batches = stack.enter_context(contextlib.closing(_batches(reader)))
            for batch in batches:
                self._add(batch, outputs)
                self._progress.update()
                if sum(self._since.values()) >= SHARD_TOKENS:
                    self._close_shard(outputs, reader.position)
                if self._is_full():
                    break
            if sum(self._since.values()):
                self._close_shard(outputs, reader.position)

    def _restore(self) -> _State:
        """Return the stored state after cutting off what was written after it."""
        try:
            content = json.loads((self.folder / _STATE).read_text())
            state = _State(**content)
            for split, tokens in (("train", state.train_tokens), ("val", state.val_tokens)):
                path = self.folder / f"{split}.bin"
                size = tokens * np.dtype(self.dtype).itemsize
                if path.stat().st_size < size:
                    raise ValueError(path)
                os.truncate(path, size)
        except (OSError, ValueError, TypeError):
            # Nothing usable: start over.
            for path in self.folder.iterdir():
                path.unlink()
            return _State()
        if state.documents:
            log.info("continuing an interrupted preparation after %d documents", state.documents)
        return state

    def _add(self, batch: list[tuple[bytes, bool]], outputs: dict[str, Any]) -> None:
        plan, state = self.plan, self.state
        end = plan.tokenizer.document_end
        texts = [_terminated(text, ends and plan.is_text, end) for text, ends in batch]
        for (raw, ends), text, ids in zip(
            batch, texts, plan.tokenizer.encode_batch(texts), strict=True
        ):
            if self._is_full():
                return
            digest = hashlib.sha256(raw).digest()
            self._hashes["text"].update(digest)
            is_held = int.from_bytes(digest[:8], "big") < plan.val_fraction * 2.0**64
            split = "val" if is_held else "train"
            if ends and plan.is_text and end is not None:
                ids = np.append(ids, end)
            if not is_held and plan.max_tokens is not None:
                ids = ids[: plan.max_tokens - state.train_tokens]
                if len(ids) and plan.max_tokens == state.train_tokens + len(ids):
                    body = ids[:-1] if ids[-1] == end else ids
                    text = plan.tokenizer.decode_bytes(body)
            self._write(split, ids.astype(self.dtype).tobytes(), outputs[split])
            state.documents += 1
            if is_held:
                state.held_out += 1
                state.val_tokens += len(ids)
                state.val_bytes += len(text)
                counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
                state.byte_counts = (counts + state.byte_counts).tolist()
            else:
                state.train_tokens += len(ids)
                state.train_bytes += len(text)
            self._since[split] += len(ids)

    def _write(self, split: str, data: bytes, output: Any) -> None:
        self._hashes[split].update(data)
        output.write(data)

    def _is_full(self) -> bool:
        plan, state = self.plan, self.state
        read = state.train_bytes + state.val_bytes
        return (plan.max_tokens is not None and state.train_tokens >= plan.max_tokens) or (
            plan.max_bytes is not None and read >= plan.max_bytes
        )

    def _close_shard(self, outputs: dict[str, Any], position: dict[str, Any]) -> None:
        for output in outputs.values():
            output.flush()
            os.fsync(output.fileno())
        record: dict[str, Any] = {f"{split}_tokens": self._since[split] for split in _SPLITS}
        record["documents"] = self.state.documents
        record |= {f"{name}_sha256": value.hexdigest() for name, value in self._hashes.items()}
        self.state.shards.append(record)
        self.state.position = position
        files.write_json(self.folder / _STATE, dataclasses.asdict(self.state))
        self._hashes = {name: hashlib.sha256() for name in self._hashes}
        self._since = dict.fromkeys(_SPLITS, 0)

    def _finish(self) -> None:
        """Join the two parts, describe them, and rename the folder to its final name."""
        state, folder = self.state, self.folder
        if not state.train_tokens or not state.val_tokens:
            part = "training" if not state.train_tokens else "validation"
            files.remove_tree(folder)
            raise DataError(
                f"{state.documents} documents: none is left for the {part} part (they are divided "
                "by their hashes); give more text, change data.val_fraction, or use "
                "data.stream=false"
            )
        with (folder / "train.bin").open("ab") as output, (folder / "val.bin").open("rb") as rest:
            while chunk := rest.read(BATCH_BYTES):
                output.write(chunk)
        tokens_sha256 = files.sha256_file(folder / "train.bin")
        tokenizer = self.plan.tokenizer
        files.write_bytes(folder / "meta.json", files.to_json(self._meta(tokens_sha256)).encode())
        files.write_bytes(folder / "tokenizer.json", files.to_json(tokenizer.to_json()).encode())
        # From here on only deletions and renames: the state goes first, so that a crash in between
        # starts over instead of reading a half-finished folder.
        (folder / _STATE).unlink()
        (folder / "val.bin").unlink()
        (folder / "train.bin").rename(folder / "tokens.bin")
        files.sync_tree(folder)
        folder.rename(self.plan.directory)

    def _meta(self, tokens_sha256: str) -> dict[str, Any]:
        state = self.state
        hashes = "".join(shard["text_sha256"] for shard in state.shards)
        return {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype,
            "train_tokens": state.train_tokens,
            "val_tokens": state.val_tokens,
            "train_bytes": state.train_bytes,
            "val_bytes": state.val_bytes,
            "documents": state.documents,
            "document_end": self.plan.tokenizer.document_end,
            "split_rule": f"{state.held_out} of {state.documents} documents held out by hash",
            "unigram_entropy_bits": count_entropy_bits(np.array(state.byte_counts)),
            "text_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "text_sha256_rule": "sha256 of the shards' hashes over the documents' hashes",
            "tokens_sha256": tokens_sha256,
            "tokenizer_sha256": tokenizer_sha256(self.plan.tokenizer),
            "shards": state.shards,
        }


def _terminated(text: bytes, ends: bool, end_id: int | None) -> bytes:
    needs_newline = ends and end_id is None and not text.endswith(b"\n")
    return text + b"\n" if needs_newline else text


def _batches(reader: DocumentReader) -> Generator[list[tuple[bytes, bool]], None, None]:
    """Yield documents together that hold about ``BATCH_BYTES``, in order."""
    batch, size = list[tuple[bytes, bool]](), 0
    with contextlib.closing(iter(reader)) as rows:
        for row in rows:
            batch.append(row)
            size += len(row[0])
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Progress:
    """A bar on a terminal, otherwise a line now and then."""

    def __init__(self, plan: StreamPlan, state: _State):
        self.plan, self.state = plan, state
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = time.monotonic()
        self._first = state.train_tokens + state.val_tokens

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import Progress

            self._bar = Progress(transient=True).__enter__()
            total = self.plan.max_tokens
            self._task = self._bar.add_task("preparing tokens", total=total)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def update(self) -> None:
        """Show how many ids there are."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.state.train_tokens)
        now = time.monotonic()
        if self._bar is None and now - self._last >= _LOG_SECONDS:
            self._last = now
            tokens = self.state.train_tokens + self.state.val_tokens
            goal = f" of {self.plan.max_tokens:,}" if self.plan.max_tokens else ""
            rate = (tokens - self._first) / (now - self._start)
            log.info("prepared %s%s tokens (%.0f per second)", f"{tokens:,}", goal, rate)
