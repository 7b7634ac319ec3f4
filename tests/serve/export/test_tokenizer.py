"""Fast tokenizers: the ids and texts of ours, through files, without code of ours."""

import json
import random
import sys
from pathlib import Path

import pytest

from common.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_level_alphabet,
    train_tokenizer,
)

transformers = pytest.importorskip("transformers")

CONTEXT = 64
# What tidying, normalising, reserved strings or byte-level letters could change.
TEXTS = (
    "",
    " ",
    "def f(x):\n    return x  # two\r\n\n",
    "don't . , ' n't  \t\u00a0 x",
    "e\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \u2028 \u0000",
    "\u0100\u0101\u0120 <|endoftext|> <pad> unknown [UNK]",
)


def with_end(tokenizer: Tokenizer) -> BpeTokenizer:
    """Return a BPE tokenizer with one more id, which ends documents."""
    model = json.loads(json.dumps(tokenizer.to_json()["tokenizer"]))
    model["model"]["vocab"]["<|endoftext|>"] = tokenizer.vocab_size
    return BpeTokenizer(model)


def make(kind: str) -> Tokenizer:
    """Return a tokenizer of a kind that knows all texts."""
    if kind == "bpe with end":
        return with_end(make("bpe"))
    return train_tokenizer(kind, [*TEXTS, "def return " * 9], 300 if kind == "bpe" else None)


KINDS = ("byte", "char", "bpe", "bpe with end")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder per kind."""
    from serve.export.tokenizer import fast_tokenizer

    paths = {kind: tmp_path_factory.mktemp("tokenizer") for kind in KINDS}
    for kind, path in paths.items():
        fast_tokenizer(make(kind), CONTEXT).save_pretrained(path)
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_ours(folders: dict[str, Path], kind: str) -> None:
    """Oracle: our tokenizer, which is exact; random texts from all characters included."""
    ours, fast = make(kind), transformers.AutoTokenizer.from_pretrained(folders[kind])
    rng = random.Random(0)
    alphabet = sorted(set("".join(TEXTS)))
    drawn = ["".join(rng.choices(alphabet, k=rng.randrange(1, 40))) for _ in range(200)]
    for text in (*TEXTS, *drawn):
        ids = fast(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), repr(text)
        assert fast.decode(ids) == text
    assert len(fast) == ours.vocab_size
    assert fast.model_max_length == CONTEXT


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode_as_ours(folders: dict[str, Path], kind: str) -> None:
    """Oracle: our tokenizer on random ids; bytes that are not UTF-8 become U+FFFD."""
    ours, fast = make(kind), transformers.AutoTokenizer.from_pretrained(folders[kind])
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        assert fast.decode(ids) == ours.decode(ids), ids


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_filled_on_the_left(folders: dict[str, Path], kind: str) -> None:
    """Oracle: the ids of each text by itself; without a token to spare the library says so."""
    fast = transformers.AutoTokenizer.from_pretrained(folders[kind])
    expected_end = make(kind).document_end
    assert fast.eos_token_id == expected_end
    if kind in ("char", "bpe"):
        assert fast.pad_token_id is None
        with pytest.raises(ValueError, match="pad"):
            fast(["def", "x"], padding=True)
        return
    batch = fast(["def", "x"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    for text, ids, mask in zip(("def", "x"), *batch.values(), strict=True):
        own = fast(text)["input_ids"]
        assert ids == [fast.pad_token_id] * (len(ids) - len(own)) + own
        assert mask == [0] * (len(ids) - len(own)) + [1] * len(own)
    assert fast.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["def", "x"]


def test_byte_ids_are_bytes(folders: dict[str, Path]) -> None:
    """Oracle: UTF-8."""
    fast = transformers.AutoTokenizer.from_pretrained(folders["byte"])
    text = "a\u00e9\u6f22" + byte_level_alphabet()[0]
    assert fast(text)["input_ids"] == list(text.encode())
    assert make("byte").to_json() == ByteTokenizer().to_json()


def test_unknown_characters_are_an_error(folders: dict[str, Path]) -> None:
    """Oracle: our tokenizer refuses them as well; nothing is dropped silently."""
    fast = transformers.AutoTokenizer.from_pretrained(folders["char"])
    assert isinstance(make("char"), CharTokenizer)
    with pytest.raises(Exception, match="UNK"):
        fast("\u9999")


def test_loads_without_our_package(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same ids where our packages are hidden and the model's type is unknown."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "lipllm")
    for name in ("common", "compress", "serve", "solvers", "train"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "config.json").write_text('{"model_type": "lipllm", "transformer": {}}')
    for file in folders["byte"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="lipllm"):
        transformers.AutoConfig.from_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fast("ab")["input_ids"] == [97, 98]
    assert fast.decode([99]) == "c"
