"""From a text source to a flat memory map of token ids, prepared once and verified on reuse.

Validation text is held out as whole documents where there are enough of them, otherwise it is the
end of the text. Documents are concatenated; each ends with a newline.
"""

import contextlib
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
from common.config import one_of
from common.corpus_config import CONTINUOUS, DataConfig
from common.documents import DocumentReader, documents
from common.errors import ConfigError, DataError
from common.packing import FORMAT_VERSION, hold_out, write_corpus
from common.pretrained import GPT2, load_tokenizer
from common.sources import (
    HUB_CORPORA,
    Files,
    Hub,
    content_sha256,
    files_stamp,
    local_files,
    stdlib_files,
)
from common.streaming import StreamPlan, prepare_stream
from common.tasks import task_files
from common.tokenizer import (
    Tokenizer,
    tokenizer_from_json,
    tokenizer_sha256,
    train_tokenizer,
)

__all__ = ["Corpus", "DataConfig", "Split", "prepare_corpus"]

log = logging.getLogger(__name__)

# A streamed corpus trains its BPE tokenizer on so much of its beginning.
BPE_SAMPLE_BYTES = 1 << 24
_COUNTED_AT_ONCE = 1 << 24

Split = Literal["train", "val"]


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
        """Return the ids (N,) of ``train`` or ``val`` as a memory map (uint8, uint16, uint32)."""
        one_of("split", split, ("train", "val"))
        boundary = self.num_tokens("train")
        return self._ids[:boundary] if split == "train" else self._ids[boundary:]

    def token_counts(self) -> np.ndarray:
        """Return how often each id occurs in the training part (V,), int64."""
        counts = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        ids = self.tokens("train")
        # In pieces: counting needs eight bytes per id.
        for start in range(0, len(ids), _COUNTED_AT_ONCE):
            piece = ids[start : start + _COUNTED_AT_ONCE]
            counts += np.bincount(piece, minlength=len(counts))
        return counts

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
        ConfigError: for the settings of images.
        DataError: for missing, empty, unreadable or binary text, or an unwritable cache.
        BackendError: when an optional package is needed and missing.
    """
    if not isinstance(config, DataConfig):
        raise ConfigError("data: these are images, expected text; choose data=stdlib or another")
    source = _source(config)
    if tokenizer is None and (config.tokenizer == "gpt2" or config.tokenizer_path):
        tokenizer = load_tokenizer(config.tokenizer_path or GPT2)
    directory = Path(config.cache) / "corpora" / _key(config, source, tokenizer)
    name = config.path or config.name or config.source
    found = _open_prepared(directory, name)
    if found is not None:
        return found
    try:
        prepare = _prepare_streamed if config.stream else _prepare_whole
        prepare(config, source, tokenizer, directory)
    except OSError as error:
        raise DataError(
            f"data.cache={config.cache}: cannot write the prepared corpus "
            f"({error.strerror or error}); free space or set data.cache=DIR"
        ) from None
    prepared = _open_prepared(directory, name)
    if prepared is None:
        raise DataError(f"{directory}: changed while being written; delete it and run again")
    return prepared


def _prepare_whole(
    config: DataConfig, source: Files | Hub, tokenizer: Tokenizer | None, directory: Path
) -> None:
    """Read the whole text, divide it exactly, and write the corpus as one step."""
    texts = list(documents(source, config.column, config.max_bytes))
    if not texts:
        raise DataError(f"corpus {config.path or config.name or config.source}: no text in it")
    train, val, rule = hold_out(
        texts,
        config.val_fraction,
        whole_documents=config.source not in CONTINUOUS,
        is_text=config.source != "bytes",
    )
    if tokenizer is None:
        tokenizer = train_tokenizer(
            config.tokenizer,
            [train] if config.tokenizer == "bpe" else [train, val],
            config.vocab_size,
        )
    write_corpus(directory, tokenizer, (train, val), rule)


def _prepare_streamed(
    config: DataConfig, source: Files | Hub, tokenizer: Tokenizer | None, directory: Path
) -> None:
    """Read the text as a stream, continuing an interrupted preparation."""
    if tokenizer is None:
        texts = _sample(source, config.column) if config.tokenizer == "bpe" else []
        tokenizer = train_tokenizer(config.tokenizer, texts, config.vocab_size)
    prepare_stream(
        StreamPlan(
            directory=directory,
            open=lambda position: DocumentReader(source, config.column, position),
            tokenizer=tokenizer,
            val_fraction=config.val_fraction,
            max_tokens=config.max_tokens,
            max_bytes=config.max_bytes,
            is_text=config.source != "bytes",
        )
    )


def _sample(source: Files | Hub, column: str) -> list[bytes]:
    texts, size = list[bytes](), 0
    with contextlib.closing(iter(DocumentReader(source, column))) as rows:
        for text, _ in rows:
            texts.append(text)
            size += len(text)
            if size >= BPE_SAMPLE_BYTES:
                break
    return texts


def _source(config: DataConfig) -> Files | Hub:
    if config.source == "stdlib":
        return stdlib_files()
    if config.task is not None and config.max_bytes is not None:
        return task_files(config.task, config.max_bytes, Path(config.cache))
    if config.path:
        return local_files(Path(config.path).expanduser(), as_bytes=config.source == "bytes")
    if config.source in HUB_CORPORA:
        return dataclasses.replace(HUB_CORPORA[config.source], revision=config.revision)
    return Hub(
        name=str(config.name),
        subset=config.subset,
        column=config.column,
        revision=config.revision,
    )


def _key(config: DataConfig, source: Files | Hub, tokenizer: Tokenizer | None) -> str:
    content: Any = None
    if not isinstance(source, Files):
        content = dataclasses.asdict(source)
    else:
        content = files_stamp(source) if config.stream else content_sha256(source)
    parts = {
        "format_version": FORMAT_VERSION,
        "content": content,
        "column": config.column,
        "tokenizer": [config.tokenizer, config.vocab_size],
        "val_fraction": config.val_fraction,
        "max_bytes": config.max_bytes,
    }
    if config.stream:
        parts["stream"] = [config.max_tokens]
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
