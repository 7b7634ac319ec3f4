"""Text to token ids and back: bytes, characters, byte-level BPE, behind one protocol.

Every tokenizer is exact: ``decode(encode(text)) == text``. ``decode`` accepts any ids in range;
bytes that are not UTF-8 (a character cut in half) come out as U+FFFD and never raise.
"""

import functools
import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from common.config import one_of
from common.errors import BackendError, ConfigError, DataError

FORMAT_VERSION = 1
KINDS = ("byte", "char", "bpe")
_BPE_CHUNK_CHARS = 1 << 16
_BYTES = 256
# Strings that the vocabularies of published byte-level tokenizers reserve for this.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """What every tokenizer offers; ids are dense, 0 to ``vocab_size - 1``.

    ``document_end`` is the id put after each document, None where a newline does that.
    """

    kind: str
    vocab_size: int
    document_end: int | None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids (T,) of ``text``, int64; ``DataError`` where it cannot be expressed."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return ``encode`` of every text; several at once where that is faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ``ids``."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``tokenizer_from_json`` needs, as plain JSON values."""


class _TableTokenizer(ABC):
    """Decoding through a table of byte strings, shared by all kinds."""

    kind: str
    vocab_size: int
    document_end: int | None = None

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = tuple(table)
        self.vocab_size = len(self._table)

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids (T,) of ``text``, int64."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return ``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of ``ids``.

        Raises:
            DataError: for an id outside 0 to ``vocab_size - 1``.
        """
        values = np.asarray(ids if hasattr(ids, "__len__") else list(ids), dtype=np.int64).ravel()
        if values.size and (values.min() < 0 or values.max() >= self.vocab_size):
            bad = int(values.min()) if values.min() < 0 else int(values.max())
            raise DataError(
                f"token id {bad}: expected 0 to {self.vocab_size - 1}; use this model's tokenizer"
            )
        return b"".join([self._table[value] for value in values.tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(_TableTokenizer):
    """The 256 byte values; any file can be expressed."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(_BYTES)])

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the UTF-8 bytes of ``text`` (T,), int64."""
        data = _as_bytes(text) if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the kind and the format version; bytes need nothing else."""
        return {"format_version": FORMAT_VERSION, "kind": self.kind}


class CharTokenizer(_TableTokenizer):
    """One id per character of a fixed alphabet, in code point order."""

    kind = "char"

    def __init__(self, alphabet: str) -> None:
        if not alphabet or sorted(set(alphabet)) != list(alphabet):
            raise ConfigError(
                f"alphabet of {len(alphabet)} characters: expected distinct characters in code "
                "point order; build it with train_tokenizer"
            )
        super().__init__([character.encode("utf-8") for character in alphabet])
        self.alphabet = alphabet
        self._codes = np.array([ord(character) for character in alphabet], dtype=np.uint32)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids (T,) of the characters of ``text``, int64.

        Raises:
            DataError: for a character outside the alphabet, or bytes that are not UTF-8.
        """
        string = _as_text(text, self.kind)
        codes = np.frombuffer(string.encode("utf-32-le"), dtype=np.uint32)
        ids = np.searchsorted(self._codes, codes).clip(max=self.vocab_size - 1)
        unknown = self._codes[ids] != codes
        if unknown.any():
            position = int(unknown.argmax())
            raise DataError(
                f"character {string[position]!r} at position {position} is not among the "
                f"{self.vocab_size} characters of this tokenizer; remove it or train with "
                "data.tokenizer=byte"
            )
        return ids.astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the alphabet as one string."""
        return {"format_version": FORMAT_VERSION, "kind": self.kind, "alphabet": self.alphabet}


class BpeTokenizer(_TableTokenizer):
    """Byte-level byte pair encoding; encoding needs the ``tokenizers`` package, decoding does not.

    Args:
        model: The ``tokenizers`` JSON of a byte-level BPE model, as plain values.
    """

    kind = "bpe"

    def __init__(self, model: Mapping[str, Any]) -> None:
        try:
            vocabulary = dict(model["model"]["vocab"])
            ids = sorted(vocabulary.values())
            strings = sorted(vocabulary, key=vocabulary.__getitem__)
            to_byte = {char: value for value, char in enumerate(byte_level_alphabet())}
            table = [bytes(to_byte[character] for character in string) for string in strings]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"BPE model without a byte-level vocabulary ({error}); restore tokenizer.json"
            ) from None
        if ids != list(range(len(ids))) or not ids:
            raise DataError("BPE vocabulary ids are not 0, 1, 2, ...; restore tokenizer.json")
        super().__init__(table)
        self._model = model
        ends = [vocabulary[string] for string in _DOCUMENT_ENDS if string in vocabulary]
        self.document_end = ends[0] if ends else None

    @functools.cached_property
    def _encoder(self) -> Any:
        return _tokenizers().Tokenizer.from_str(json.dumps(self._model))

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return the ids (T,) of ``text``, int64; long texts are encoded in pieces of 65,536.

        Raises:
            DataError: for bytes that are not UTF-8.
            BackendError: when ``tokenizers`` is not installed.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """Return ``encode`` of every text, with one thread per core."""
        pieces, counts = list[str](), list[int]()
        for text in texts:
            string = _as_text(text, self.kind)
            starts = range(0, len(string), _BPE_CHUNK_CHARS)
            pieces += [string[start : start + _BPE_CHUNK_CHARS] for start in starts]
            counts.append(len(starts))
        encodings = self._encoder.encode_batch_fast(pieces, add_special_tokens=False)
        arrays = (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)
        empty = np.empty(0, dtype=np.int64)
        return [np.concatenate([empty, *itertools.islice(arrays, n)]) for n in counts]

    def to_json(self) -> dict[str, Any]:
        """Return the ``tokenizers`` JSON below the key ``tokenizer``."""
        head = {"format_version": FORMAT_VERSION, "kind": self.kind}
        return {**head, "tokenizer": self._model}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Return the tokenizer that ``to_json`` described.

    Raises:
        DataError: for an unknown kind, a foreign format version or missing fields.
    """
    remedy = "restore tokenizer.json from the training run"
    if not isinstance(value, Mapping) or value.get("kind") not in KINDS:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        raise DataError(f"tokenizer kind {kind!r}: expected one of {', '.join(KINDS)}; {remedy}")
    if value.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"tokenizer format version {value.get('format_version')!r}: expected "
            f"{FORMAT_VERSION}; {remedy}"
        )
    if value["kind"] == "byte":
        return ByteTokenizer()
    field = "alphabet" if value["kind"] == "char" else "tokenizer"
    if field not in value:
        raise DataError(f"{value['kind']} tokenizer without {field!r}; {remedy}")
    return CharTokenizer(value[field]) if field == "alphabet" else BpeTokenizer(value[field])


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Return the sha256 (hex) of the tokenizer's JSON in canonical form."""
    text = json.dumps(tokenizer.to_json(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(
    kind: str, texts: Sequence[str | bytes], vocab_size: int | None = None
) -> Tokenizer:
    """Build a tokenizer of ``kind`` from texts.

    Args:
        kind: ``byte`` (texts are not read), ``char`` (alphabet of the texts) or ``bpe``.
        texts: Training texts, UTF-8 where bytes.
        vocab_size: Number of ids for ``bpe``, at least 256 (default 1,024); a byte or character
            tokenizer accepts only its own size or None.

    Raises:
        ConfigError: for an unknown kind or an impossible size.
        DataError: for text that is empty or not UTF-8 where characters are needed.
        BackendError: when ``bpe`` is asked for and ``tokenizers`` is not installed.
    """
    one_of("data.tokenizer", kind, KINDS)
    if kind == "bpe":
        return _train_bpe(texts, 1024 if vocab_size is None else vocab_size)
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        alphabet = set().union(*(_as_text(text, kind) for text in texts))
        if not alphabet:
            raise DataError("character tokenizer of an empty text; give a text with characters")
        tokenizer = CharTokenizer("".join(sorted(alphabet)))
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"vocab_size={vocab_size}: a {kind} tokenizer of this text has exactly "
            f"{tokenizer.vocab_size} ids; leave vocab_size empty or use tokenizer=bpe"
        )
    return tokenizer


def _train_bpe(texts: Sequence[str | bytes], vocab_size: int) -> BpeTokenizer:
    if vocab_size < _BYTES:
        raise ConfigError(f"vocab_size={vocab_size}: expected at least {_BYTES} for BPE; raise it")
    library = _tokenizers()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=byte_level_alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((_as_text(text, "bpe") for text in texts), trainer)
    return BpeTokenizer(json.loads(model.to_str()))


def _as_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {text[error.start]!r} at position {error.start} is half a surrogate pair "
            "and has no UTF-8 form; pass the text as bytes"
        ) from None


def _as_text(text: str | bytes, kind: str) -> str:
    if isinstance(text, str):
        _as_bytes(text)
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {text[error.start]:#04x} at offset {error.start} is not UTF-8, which a {kind} "
            "tokenizer needs; use tokenizer=byte, which accepts any bytes"
        ) from None


@functools.cache
def byte_level_alphabet() -> list[str]:
    """Return the character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 bytes stand for themselves, the others move past code point 255 in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(_BYTES, 2 * _BYTES))
    return [chr(value if value in printable else next(moved)) for value in range(_BYTES)]


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise BackendError(
            "byte pair encoding needs the package tokenizers: pip install 'lipllm[hf]', or use "
            "tokenizer=byte"
        ) from None
    return tokenizers
