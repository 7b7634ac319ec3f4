"""Incremental text against decoding everything at once."""

import random

import pytest

from common.tokenizer import ByteTokenizer
from serve.engine.detokenizer import Detokenizer
from serve.engine.sampling_params import SamplingParams

BYTES = ByteTokenizer()
TEXT = "a\u00e9\u4e2d\U0001f600z\u0301 end"


def pieces(data: bytes, params: SamplingParams, sizes: list[int]) -> tuple[list[str], int, str]:
    """Push bytes in groups; return the pieces, the tokens used and the stop string or ""."""
    detokenizer, out, used, start = Detokenizer(BYTES, params), [], 0, 0
    for index, size in enumerate(sizes):
        tokens = list(data[start : start + size])
        text, count = detokenizer.push(tokens, is_last=index == len(sizes) - 1)
        out.append(text)
        used, start = used + count, start + size
    return out, used, detokenizer.stop or ""


def split(rng: random.Random, total: int) -> list[int]:
    """Return random group sizes with the given sum."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(rng.randrange(1, 4), total - sum(sizes)))
    return sizes or [0]


def test_pieces_end_between_characters() -> None:
    """Oracle: the characters themselves; each appears with its last byte."""
    data = TEXT.encode()
    out, used, _ = pieces(data, SamplingParams(), [1] * len(data))
    assert [piece for piece in out if piece] == list(TEXT)
    assert used == len(data)


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_in_any_pieces_give_the_decoded_whole(seed: int) -> None:
    """Oracle: decoding all bytes at once, invalid ones and a cut character included."""
    rng = random.Random(seed)
    for _ in range(100):
        data = bytes(rng.choice((*TEXT.encode(), 0xFF, 0x80, 0xE4)) for _ in range(20))
        out, _, _ = pieces(data, SamplingParams(), split(rng, 20))
        assert "".join(out) == BYTES.decode(list(data))


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_string_never_shows_and_ends_the_text(seed: int) -> None:
    """Oracle: byte by byte, the first position at which any stop string is complete."""
    rng = random.Random(seed)
    for _ in range(200):
        stops = tuple("".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(3))
        text = "".join(rng.choices("abc", weights=(5, 5, 3), k=24))
        least = rng.choice((0, 0, 6))
        out, used, stop = pieces(
            text.encode(), SamplingParams(stop=stops, min_tokens=least), split(rng, 24)
        )
        ends = [
            (end, text.index(s, max(0, end - len(s))), s)
            for end in range(max(1, least), 25)
            for s in stops
            if text[:end].endswith(s)
        ]
        if not ends:
            assert ("".join(out), used, stop) == (text, 24, "")
            continue
        first = min(end for end, _, _ in ends)
        cut = min(place for end, place, _ in ends if end == first)
        assert "".join(out) == text[:cut]
        assert used == first
        assert text[cut:first] == stop


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    """Oracle: by hand."""
    params = SamplingParams(stop=("END", "NOW!"))
    out, _, _ = pieces(b"xENxNOWxE", params, [1] * 9)
    assert out == ["x", "", "", "ENx", "", "", "", "NOWx", "E"]


def test_stop_tokens_have_no_text() -> None:
    """Oracle: the documented rule."""
    detokenizer = Detokenizer(BYTES, SamplingParams(), stop_ids={ord("!")})
    assert detokenizer.push([*b"hi!"], is_last=True) == ("hi", 3)


class Words:
    """A tokenizer that drops the space before the first word, and knows half characters."""

    kind = "words"
    table = (b" one", b" two", b"ten", b"\xf0\x9f", b"\x98\x80", b"\xe4", b" ", b"!")

    def decode(self, ids: list[int]) -> str:
        """Decode with the rule of SentencePiece decoders for the first token."""
        text = b"".join(self.table[token] for token in ids).decode(errors="replace")
        return text.removeprefix(" ")


@pytest.mark.parametrize("seed", range(4))
def test_tokenizers_with_rules_for_the_first_token_give_the_decoded_whole(seed: int) -> None:
    """Oracle: decoding all tokens at once."""
    rng, tokenizer = random.Random(seed), Words()
    for _ in range(100):
        tokens = [rng.choice((0, 1, 2, 6, 7)) for _ in range(12)]
        at = rng.randrange(12)
        tokens[at:at] = [3, 4]
        detokenizer = Detokenizer(tokenizer, SamplingParams())
        out = [detokenizer.push([token])[0] for token in tokens]
        out.append(detokenizer.push([], is_last=True)[0])
        assert "".join(out) == tokenizer.decode(tokens)
        assert "\ufffd" not in "".join(out)


def test_bytes_that_are_no_character_do_not_hold_the_text_back_forever() -> None:
    """Oracle: everything is out at the end, and most of it before."""
    detokenizer = Detokenizer(Words(), SamplingParams())
    out = [detokenizer.push([5])[0] for _ in range(40)]
    assert sum(map(len, out)) >= 32
    assert "".join(out) + detokenizer.push([], is_last=True)[0] == "\ufffd" * 40
