"""Which text, which tokenizer, which split: the settings of a corpus."""

import dataclasses

from common.config import check_types, one_of, positive
from common.errors import ConfigError
from common.sources import HUB_CORPORA
from common.tasks import Task
from common.tokenizer import KINDS

SOURCES = ("stdlib", *HUB_CORPORA, "local", "bytes", "hub", "task")
# Their rows are consecutive lines of one text, not documents.
CONTINUOUS = ("wikitext", "shakespeare", "bytes")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What text, which tokenizer, which split.

    Attributes:
        source: ``stdlib`` (the running interpreter's library), ``shakespeare``, ``wikitext``,
            ``fineweb``, ``fineweb_edu`` (from the hub, or from ``path``), ``local`` (text, jsonl
            or parquet at ``path``), ``bytes`` (any file at ``path``), ``hub`` (data set ``name``),
            ``task`` (documents of ``task``).
        task: Generator of the text, for source ``task``.
        path: File or directory; required for ``local`` and ``bytes``.
        name: Hub repository, ``owner/name``.
        subset: Hub subset, or None.
        revision: Hub revision (commit or tag), or None for the newest.
        column: Text column of jsonl, parquet and hub tables.
        tokenizer: ``byte``, ``char``, ``bpe`` (trained on the text unless ``tokenizer_path`` is
            given) or ``gpt2``; ignored where a tokenizer is given.
        tokenizer_path: Byte-level BPE tokenizer: ``tokenizer.json``, its folder, or OWNER/NAME on
            the hub (``gpt2`` without it: the hub's).
        vocab_size: Number of ids of a BPE tokenizer that is trained (default 1,024).
        val_fraction: Share of the bytes held out, above 0, at most 0.5.
        max_bytes: Use only the first so many bytes, or None for all; of a task so many are made.
        stream: Read the text as a stream, in bounded memory, resumable: documents are held out by
            their hashes, and local files are known by name, size and time.
        max_tokens: Training tokens after which a streamed corpus ends, or None for all.
        cache: Directory of prepared corpora.
    """

    source: str = "stdlib"
    task: Task | None = None
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    column: str = "text"
    tokenizer: str = "byte"
    tokenizer_path: str | None = None
    vocab_size: int | None = None
    val_fraction: float = 0.1
    max_bytes: int | None = None
    stream: bool = False
    max_tokens: int | None = None
    cache: str = ".cache"

    def __post_init__(self) -> None:
        check_types(self)
        one_of("data.source", self.source, SOURCES)
        one_of("data.tokenizer", self.tokenizer, (*KINDS, "gpt2"))
        positive("data.val_fraction", self.val_fraction)
        if self.val_fraction > 0.5:
            raise ConfigError(f"data.val_fraction={self.val_fraction}: expected at most 0.5")
        for field in ("max_bytes", "vocab_size", "max_tokens"):
            if getattr(self, field) is not None:
                positive(f"data.{field}", getattr(self, field))
        if self.source in ("local", "bytes") and not self.path:
            raise ConfigError(f"data.path: data.source={self.source} needs it; set data.path=FILE")
        self._check_task()
        if self.source == "stdlib" and self.path:
            raise ConfigError(
                f"data.path={self.path}: data.source=stdlib takes no path; use data=local"
            )
        if self.source == "hub" and not self.name:
            raise ConfigError("data.name: data.source=hub needs it; set data.name=OWNER/NAME")
        if self.tokenizer_path and self.tokenizer not in ("bpe", "gpt2"):
            raise ConfigError(
                f"data.tokenizer_path={self.tokenizer_path}: data.tokenizer={self.tokenizer} reads "
                "none; set data.tokenizer=bpe"
            )
        self._check_stream()

    def _check_stream(self) -> None:
        if not self.stream:
            if self.max_tokens is not None:
                raise ConfigError(
                    f"data.max_tokens={self.max_tokens}: only a streamed corpus has a token "
                    "budget; set data.stream=true, or use data.max_bytes"
                )
        elif self.source in ("shakespeare", "wikitext"):
            raise ConfigError(
                f"data.stream=true: data.source={self.source} is one text, not documents; set "
                "data.stream=false"
            )
        elif self.tokenizer == "char":
            raise ConfigError(
                "data.tokenizer=char: its alphabet needs the whole text, which a stream never has; "
                "set data.stream=false, or data.tokenizer=byte"
            )

    def _check_task(self) -> None:
        if (self.source == "task") != (self.task is not None):
            raise ConfigError(
                f"data.task={self.task}: data.source={self.source}, expected a task with source "
                "task and only there; use data=recall"
            )
        if self.task is not None and self.max_bytes is None:
            raise ConfigError(
                "data.max_bytes=null: a task writes text without end; set data.max_bytes=4000000"
            )
