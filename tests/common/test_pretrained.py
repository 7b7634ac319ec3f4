"""Published tokenizers: exact on any text, reserved strings are text, clear errors."""

import json

import numpy as np
import pytest
import tokenizers

from common.corpus import DataConfig, prepare_corpus
from common.errors import DataError
from common.pretrained import load_tokenizer
from common.tokenizer import tokenizer_from_json, train_tokenizer

TEXT = "def f(a):\r\n    return a  # \u00e9\u6f22\U0001f600 it's 1234\n\n" * 40
LITERAL = "a <|endoftext|> b"


@pytest.fixture
def model():
    """Return a model like GPT-2's: byte-level merges, then one reserved string."""
    content = train_tokenizer("bpe", [TEXT], 300).to_json()["tokenizer"]
    end = len(content["model"]["vocab"])
    content["model"]["vocab"]["<|endoftext|>"] = end
    token = {"id": end, "content": "<|endoftext|>", "special": True, "single_word": False}
    content["added_tokens"] = [{**token, "lstrip": False, "rstrip": False, "normalized": True}]
    content["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True,
    }  # fmt: skip
    return content


def write(path, content):
    """Write JSON and return the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_ids_are_those_of_the_library(tmp_path, model):
    """Oracle: the tokenizers library itself, on text without reserved strings."""
    place = write(tmp_path / "tokenizer.json", model)
    ours = load_tokenizer(place)
    theirs = tokenizers.Tokenizer.from_file(place)
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.document_end == ours.vocab_size - 1
    assert load_tokenizer(str(tmp_path)).document_end == ours.document_end


def test_reserved_strings_in_a_text_are_text(tmp_path, model):
    """Oracle: the library takes the literal for the end of a document, we must not."""
    place = write(tmp_path / "tokenizer.json", model)
    ours = load_tokenizer(place)
    assert (
        model["added_tokens"][0]["id"] in tokenizers.Tokenizer.from_file(place).encode(LITERAL).ids
    )
    assert ours.document_end not in ours.encode(LITERAL)
    assert ours.decode(ours.encode(LITERAL)) == LITERAL


def test_reserved_ids_outside_the_vocabulary_become_entries(tmp_path, model):
    """Oracle: ids stay dense and decode to the reserved string's bytes."""
    end = model["model"]["vocab"].pop("<|endoftext|>")
    model["added_tokens"].append({**model["added_tokens"][0], "id": end + 1, "content": "<a b>"})
    ours = load_tokenizer(write(tmp_path / "tokenizer.json", model))
    assert ours.vocab_size == end + 2
    assert ours.decode([end, end + 1]) == "<|endoftext|><a b>"
    assert ours.document_end == end


def test_the_two_original_files_are_enough(tmp_path, model):
    """Oracle: the same ids as from the one file."""
    whole = load_tokenizer(write(tmp_path / "one" / "tokenizer.json", model))
    write(tmp_path / "two" / "vocab.json", model["model"]["vocab"])
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
    (tmp_path / "two" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    halves = load_tokenizer(str(tmp_path / "two"))
    assert np.array_equal(halves.encode(TEXT), whole.encode(TEXT))


def test_round_trip_through_a_bundle(tmp_path, model):
    """Oracle: JSON there and back, with the end of document."""
    ours = load_tokenizer(write(tmp_path / "tokenizer.json", model))
    stored = write(tmp_path / "bundle" / "tokenizer.json", ours.to_json())
    for copy in (
        tokenizer_from_json(json.loads(json.dumps(ours.to_json()))),
        load_tokenizer(stored),
    ):
        assert copy.document_end == ours.document_end
        assert np.array_equal(copy.encode(TEXT), ours.encode(TEXT))


def test_batches_equal_single_texts(tmp_path, model):
    """Oracle: one by one, also empty and long texts."""
    ours = load_tokenizer(write(tmp_path / "tokenizer.json", model))
    texts = [b"", TEXT.encode(), b"a" * 70_000, b"", LITERAL.encode()]
    for found, text in zip(ours.encode_batch(texts), texts, strict=True):
        assert np.array_equal(found, ours.encode(text))


@pytest.mark.parametrize("stream", [False, True])
def test_corpus_with_a_given_tokenizer(tmp_path, model, stream):
    """Oracle: the text again; the tokenizer of the file, not a trained one."""
    place = write(tmp_path / "tokenizer.json", model)
    rows = [f"row {i} of a table" for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    corpus = prepare_corpus(
        DataConfig(
            source="local",
            path=str(tmp_path / "t.jsonl"),
            tokenizer="gpt2",
            val_fraction=0.3,
            tokenizer_path=place,
            stream=stream,
        )
    )
    assert corpus.tokenizer.document_end == model["added_tokens"][0]["id"]
    text = corpus.tokenizer.decode(corpus.tokens("train")).replace("<|endoftext|>", "\n")
    assert set(text.splitlines()) < set(rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "does not give back the text"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a WordPiece tokenizer, not BPE"),
        ({"model": None}, "not the JSON of a tokenizer"),
    ],
)
def test_foreign_tokenizers_are_refused(tmp_path, model, change, expected):
    """Oracle: one line with the reason and what to give."""
    place = write(tmp_path / "tokenizer.json", model | change)
    with pytest.raises(DataError, match=rf"{expected}.*data\.tokenizer_path=FILE") as caught:
        load_tokenizer(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["nowhere.json", "./a/b", "openai-community/gpt2"])
def test_missing_tokenizer_names_the_setting(place):
    """Oracle: no network here, so the hub's is missing as well; nothing is retried for long."""
    with pytest.raises(DataError, match=r"data\.tokenizer_path=FILE") as caught:
        load_tokenizer(place)
    assert "\n" not in str(caught.value)
