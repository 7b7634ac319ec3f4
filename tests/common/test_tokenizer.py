"""Tokenizers: exact round trips, decoding that never raises, errors that say what to do."""

import json
import random

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.tokenizer import (
    KINDS,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    tokenizer_from_json,
    tokenizer_sha256,
    train_tokenizer,
)

ALPHABET = "ab \n\t\r\x00\x7f\u00e9\u2028\u6f22\U0001f600<|>_def()"
TEXT = "def f(a):\r\n    return a  # \u00e9\u6f22\U0001f600\n\n" * 40 + ALPHABET


@pytest.fixture(params=KINDS)
def tokenizer(request):
    """Return a tokenizer of each kind that knows ``ALPHABET``."""
    return train_tokenizer(request.param, [TEXT], 300 if request.param == "bpe" else None)


def test_round_trip_is_exact(tokenizer):
    """Oracle: identity on random strings, as text and as bytes."""
    generator = random.Random(0)
    for length in [*range(6), 50, 500]:
        text = "".join(generator.choices(ALPHABET, k=length))
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert np.array_equal(tokenizer.encode(text.encode()), ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert tokenizer.decode(iter(ids.tolist())) == text


def test_json_round_trip(tokenizer):
    """Oracle: the copy encodes alike and has the same hash."""
    copy = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert copy.kind == tokenizer.kind
    assert copy.vocab_size == tokenizer.vocab_size
    assert np.array_equal(copy.encode(TEXT), tokenizer.encode(TEXT))
    assert tokenizer_sha256(copy) == tokenizer_sha256(tokenizer)


def test_any_ids_decode(tokenizer):
    """Oracle: every id alone and random sequences give text; cut characters give U+FFFD."""
    generator = random.Random(1)
    for index in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([index]), str)
    for _ in range(50):
        assert isinstance(
            tokenizer.decode(generator.choices(range(tokenizer.vocab_size), k=9)), str
        )
    if tokenizer.kind == "byte":
        assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_id_out_of_range_is_refused(tokenizer, bad):
    """Oracle: ids of another vocabulary are an error, not text."""
    with pytest.raises(DataError, match=str(bad)):
        tokenizer.decode([0, bad])


def test_every_byte_string_is_exact_with_bytes():
    """Oracle: identity on all byte values, UTF-8 or not."""
    data = bytes(range(256)) * 2
    assert ByteTokenizer().decode_bytes(ByteTokenizer().encode(data)) == data


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_bytes_that_are_not_text_are_refused(kind):
    """Oracle: the message names the byte, its offset and the tokenizer that accepts it."""
    tokenizer = train_tokenizer(kind, [TEXT])
    with pytest.raises(DataError, match=r"0xff at offset 2 .*tokenizer=byte"):
        tokenizer.encode(b"ab\xff")


def test_lone_surrogate_is_refused(tokenizer):
    """Oracle: such a string has no UTF-8 form."""
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_unknown_character_is_named():
    """Oracle: the message names the character and its position."""
    with pytest.raises(DataError, match=r"'z' at position 1 .* 3 characters"):
        CharTokenizer("abc").encode("azb")


def test_char_alphabet_is_sorted_and_checked():
    """Oracle: ids follow code points; anything else is refused."""
    tokenizer = train_tokenizer("char", ["ba", "cab"])
    assert tokenizer.alphabet == "abc"
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]
    for alphabet in ("", "ba", "aab"):
        with pytest.raises(ConfigError, match="alphabet"):
            CharTokenizer(alphabet)


def test_bpe_merges_and_keeps_its_size():
    """Oracle: fewer tokens than bytes, at most the asked size, ids dense."""
    tokenizer = train_tokenizer("bpe", [TEXT], 280)
    assert 256 < tokenizer.vocab_size <= 280
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2
    assert b"".join(tokenizer.decode_bytes([i]) for i in range(256)) != b""


def test_bpe_text_that_looks_special_is_text():
    """Oracle: no reserved strings, so nothing in a corpus is swallowed."""
    tokenizer = train_tokenizer("bpe", [TEXT], 270)
    text = "<|endoftext|> </s> [UNK]"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"kind": "spell", "format_version": 1},
        {"kind": "byte", "format_version": 2},
        {"kind": "char", "format_version": 1},
        {"kind": "bpe", "format_version": 1, "tokenizer": {"model": {}}},
        {"kind": "bpe", "format_version": 1, "tokenizer": {"model": {"vocab": {"a": 5}}}},
        {"kind": "bpe", "format_version": 1, "tokenizer": {"model": {"vocab": {"\u6f22": 0}}}},
    ],
)
def test_foreign_json_is_refused(value):
    """Oracle: one line that says to restore the file."""
    with pytest.raises(DataError, match="restore") as caught:
        tokenizer_from_json(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [("byte", 300, "256"), ("char", 9, "3 ids"), ("bpe", 255, "256"), ("spell", None, "spell")],
)
def test_impossible_size_is_refused(kind, size, expected):
    """Oracle: the message has the size that would be possible."""
    with pytest.raises(ConfigError, match=expected):
        train_tokenizer(kind, ["abc"], size)


def test_empty_text_has_no_alphabet():
    """Oracle: a character tokenizer of nothing is an error of the data."""
    with pytest.raises(DataError, match="empty"):
        train_tokenizer("char", [""])


def test_bpe_decodes_without_its_library(monkeypatch):
    """Oracle: serving a trained model needs ``tokenizers`` only for encoding."""
    tokenizer = train_tokenizer("bpe", [TEXT], 270)
    ids, content = tokenizer.encode(TEXT), tokenizer.to_json()
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert BpeTokenizer(content["tokenizer"]).decode(ids) == TEXT
