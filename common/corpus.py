"""From a text source to a flat memory map of token ids, prepared once and verified on reuse.

Validation text is held out as whole documents where there are enough of them, otherwise it is the
end of the text. Documents are concatenated; each ends with a newline.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common import files
from common.config import check_types, one_of, positive
from common.errors import ConfigError, DataError
from common.packing import FORMAT_VERSION, hold_out, write_corpus
from common.sources import (
    HUB_CORPORA,
    Files,
    Hub,
    content_sha256,
    documents,
    local_files,
    stdlib_files,
)
from common.tokenizer import (
    KINDS,
    Tokenizer,
    tokenizer_from_json,
    tokenizer_sha256,
    train_tokenizer,
)

log = logging.getLogger(__name__)

SOURCES = ("stdlib", *HUB_CORPORA, "local", "bytes", "hub")
# Their rows are consecutive lines of one text, not documents.
_CONTINUOUS = ("wikitext", "shakespeare", "bytes")

Split = Literal["train", "val"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What text, which tokenizer, which split.

    Attributes:
        source: ``stdlib`` (the running interpreter's library), ``shakespeare``, ``wikitext``,
            ``fineweb`` (from the hub, or from ``path``), ``local`` (text, jsonl or parquet at
            ``path``), ``bytes`` (any file at ``path``), ``hub`` (data set ``name``).
        path: File or directory; required for ``local`` and ``bytes``.
        name: Hub repository, ``owner/name``.
        subset: Hub subset, or None.
        column: Text column of jsonl, parquet and hub tables.
        tokenizer: ``byte``, ``char`` or ``bpe``; ignored where a tokenizer is given.
        vocab_size: Number of ids of a BPE tokenizer (default 1,024).
        val_fraction: Share of the bytes held out, above 0, at most 0.5.
        max_bytes: Use only the first so many bytes, or None for all.
        cache: Directory of prepared corpora.
    """

    source: str = "stdlib"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    column: str = "text"
    tokenizer: str = "byte"
    vocab_size: int | None = None
    val_fraction: float = 0.1
    max_bytes: int | None = None
    cache: str = ".cache"

    def __post_init__(self) -> None:
        check_types(self)
        one_of("data.source", self.source, SOURCES)
        one_of("data.tokenizer", self.tokenizer, KINDS)
        positive("data.val_fraction", self.val_fraction)
        if self.val_fraction > 0.5:
            raise ConfigError(f"data.val_fraction={self.val_fraction}: expected at most 0.5")
        for field in ("max_bytes", "vocab_size"):
            if getattr(self, field) is not None:
                positive(f"data.{field}", getattr(self, field))
        if self.source in ("local", "bytes") and not self.path:
            raise ConfigError(f"data.path: data.source={self.source} needs it; set data.path=FILE")
        if self.source == "stdlib" and self.path:
            raise ConfigError(
                f"data.path={self.path}: data.source=stdlib takes no path; use data=local"
            )
        if self.source == "hub" and not self.name:
            raise ConfigError("data.name: data.source=hub needs it; set data.name=OWNER/NAME")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus: token ids on disk, their tokenizer and what is known about the text.

    Attributes:
        directory: Folder with ``tokens.bin``, ``tokenizer.json`` and ``meta.json``.
        tokenizer: The tokenizer that made the ids.
        meta: Content of ``meta.json``, and ``source``.
    """

    directory: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Sha256 (hex) of the whole text's bytes: training part, then validation part."""
        return str(self.meta["text_sha256"])

    @property
    def unigram_entropy_bits(self) -> float:
        """Entropy of single bytes on the validation text, bits per byte: the untrained floor."""
        return float(self.meta["unigram_entropy_bits"])

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per validation token; 1 for bytes."""
        return float(self.meta["val_bytes"] / self.meta["val_tokens"])

    @functools.cached_property
    def _ids(self) -> np.memmap:
        return np.memmap(self.directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens of a split."""
        return int(self.meta[f"{split}_tokens"])

    def tokens(self, split: Split) -> np.ndarray:
        """Return the ids (N,) of ``train`` or ``val`` as a read-only memory map (uint8, uint16)."""
        one_of("split", split, ("train", "val"))
        boundary = self.num_tokens("train")
        return self._ids[:boundary] if split == "train" else self._ids[boundary:]

    def require(self, context: int) -> None:
        """Check that both splits hold at least one window of ``context`` inputs and its targets.

        Raises:
            DataError: naming the split that is too short.
        """
        for split in ("train", "val"):
            count = self.num_tokens(split)
            if count < context + 1:
                raise DataError(
                    f"corpus {self.meta['source']}: {count} {split} tokens, expected at least "
                    f"{context + 1} for a context of {context}; give more text, or lower "
                    "model.context"
                )

    def windows(self, split: Split, length: int, limit: int | None = None) -> Tensor:
        """Return disjoint windows of a split, in order.

        Args:
            split: ``train`` or ``val``.
            length: Inputs per window; the next window starts ``length`` tokens later, so every
                token is a target once.
            limit: At most so many windows, spread evenly over the split.

        Returns:
            Ids (N, length + 1), int64: inputs and their next tokens.

        Raises:
            DataError: when the split holds no whole window.
        """
        ids = self.tokens(split)
        count = (len(ids) - 1) // length
        if count < 1:
            self.require(length)
        keep = np.arange(count)
        if limit is not None and limit < count:
            keep = np.linspace(0, count - 1, limit).round().astype(np.int64)
        index = keep[:, None] * length + np.arange(length + 1)
        return torch.from_numpy(ids[index].astype(np.int64))

    def describe(self) -> dict[str, Any]:
        """Return the data statement of reports: source, sizes, split rule, entropy, hashes."""
        return {
            **self.meta,
            "bytes_per_token": self.bytes_per_token,
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
        }


def prepare_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Return the corpus of ``config``, preparing it once per content and tokenizer.

    Args:
        config: Source, tokenizer and split.
        tokenizer: Use this one (of a trained model) instead of building ``config.tokenizer``.

    Raises:
        DataError: for missing, empty, unreadable or binary text, or an unwritable cache.
        BackendError: when an optional package is needed and missing.
    """
    source = _source(config)
    directory = Path(config.cache) / "corpora" / _key(config, source, tokenizer)
    name = config.path or config.name or config.source
    found = _open_prepared(directory, name)
    if found is not None:
        return found
    texts = list(documents(source, config.column, config.max_bytes))
    if not texts:
        raise DataError(f"corpus {name}: no text in it; give another")
    train, val, rule = hold_out(
        texts,
        config.val_fraction,
        whole_documents=config.source not in _CONTINUOUS,
        is_text=config.source != "bytes",
    )
    if tokenizer is None:
        tokenizer = train_tokenizer(
            config.tokenizer,
            [train] if config.tokenizer == "bpe" else [train, val],
            config.vocab_size,
        )
    try:
        write_corpus(directory, tokenizer, (train, val), rule)
    except OSError as error:
        raise DataError(
            f"data.cache={config.cache}: cannot write the prepared corpus "
            f"({error.strerror or error}); free space or set data.cache=DIR"
        ) from None
    prepared = _open_prepared(directory, name)
    if prepared is None:
        raise DataError(f"{directory}: changed while being written; delete it and run again")
    return prepared


def _source(config: DataConfig) -> Files | Hub:
    if config.source == "stdlib":
        return stdlib_files()
    if config.path:
        return local_files(Path(config.path).expanduser(), as_bytes=config.source == "bytes")
    if config.source in HUB_CORPORA:
        return HUB_CORPORA[config.source]
    return Hub(name=str(config.name), subset=config.subset, column=config.column)


def _key(config: DataConfig, source: Files | Hub, tokenizer: Tokenizer | None) -> str:
    content = content_sha256(source) if isinstance(source, Files) else dataclasses.asdict(source)
    parts = {
        "format_version": FORMAT_VERSION,
        "content": content,
        "column": config.column,
        "tokenizer": [config.tokenizer, config.vocab_size],
        "val_fraction": config.val_fraction,
        "max_bytes": config.max_bytes,
    }
    if tokenizer is not None:
        parts["tokenizer"] = tokenizer_sha256(tokenizer)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{config.source}-{digest[:16]}"


def _open_prepared(directory: Path, name: str) -> Corpus | None:
    """Open a prepared corpus; a damaged one is removed, so that it is prepared again."""
    if not directory.is_dir():
        return None
    try:
        meta = json.loads((directory / "meta.json").read_text())
        tokenizer = tokenizer_from_json(json.loads((directory / "tokenizer.json").read_text()))
        intact = files.sha256_file(directory / "tokens.bin") == meta["tokens_sha256"]
        intact &= tokenizer_sha256(tokenizer) == meta["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        log.warning("%s: damaged corpus cache, preparing it again", directory)
        files.remove_tree(directory)
        return None
    # The same text may have come from another path before.
    return Corpus(directory=directory, tokenizer=tokenizer, meta={"source": name} | meta)
