"""Streamed corpora: exact content, exact budget, exact resume, bounded memory."""

import hashlib
import json
import multiprocessing
import tracemalloc

import numpy as np
import pytest

from common import documents, streaming
from common.corpus import DataConfig, prepare_corpus
from common.errors import ConfigError, DataError
from common.packing import entropy_bits
from common.streaming import partial_path
from common.tokenizer import BpeTokenizer, train_tokenizer

SHARE = 0.3
ROWS = [f"document {i} " + "abc \u00e9\u6f22 " * (i % 17) for i in range(120)]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Shards and batches small enough that a test has many."""
    monkeypatch.setattr(streaming, "SHARD_TOKENS", 700)
    monkeypatch.setattr(streaming, "BATCH_BYTES", 200)
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)


def is_held(text):
    """The rule, written out: the first 8 bytes of the hash as a share of the unit interval."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64 < SHARE


def write_rows(path, rows=ROWS):
    """Write a jsonl or parquet table, or text, by suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pa.Table.from_pylist([{"text": row} for row in rows]), path, row_group_size=13
        )
    else:
        path.write_text("\n".join(rows))
    return path


def prepare(path, cache="cache", **settings):
    """Prepare a streamed local corpus."""
    fields = {"source": "local", "path": str(path), "stream": True, "val_fraction": SHARE}
    return prepare_corpus(DataConfig(cache=cache, **(fields | settings)))


def text_of(corpus, split):
    """Return the bytes of a split."""
    return corpus.tokenizer.decode_bytes(corpus.tokens(split))


def with_end(size=300):
    """Return a trained BPE tokenizer whose last id is the end of a document."""
    model = train_tokenizer("bpe", ROWS, size).to_json()["tokenizer"]
    model["model"]["vocab"]["<|endoftext|>"] = len(model["model"]["vocab"])
    return BpeTokenizer(model)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_are_divided_by_their_hashes(tmp_path, suffix):
    """Oracle: the rule applied to every row, in order, each ended by a newline."""
    corpus = prepare(write_rows(tmp_path / f"t{suffix}"))
    for split in ("train", "val"):
        expected = [row for row in ROWS if is_held(row.encode()) == (split == "val")]
        assert text_of(corpus, split).decode() == "".join(row + "\n" for row in expected)
        assert corpus.meta[f"{split}_bytes"] == len(text_of(corpus, split))
    val = text_of(corpus, "val")
    assert corpus.unigram_entropy_bits == pytest.approx(entropy_bits(val), abs=1e-12)
    assert corpus.meta["documents"] == len(ROWS)
    assert len(corpus.meta["shards"]) > 3
    assert sum(shard["train_tokens"] for shard in corpus.meta["shards"]) == corpus.num_tokens(
        "train"
    )


def test_plain_text_is_streamed_in_pieces(tmp_path):
    """Oracle: the pieces (100 bytes and the rest of the line) divided by their hashes."""
    path = write_rows(tmp_path / "t.txt")
    corpus = prepare(path)
    data, pieces = path.read_bytes(), []
    while data:
        end = data.find(b"\n", 100)
        cut = len(data) if end < 0 else end + 1
        pieces.append(data[:cut])
        data = data[cut:]
    assert not pieces[-1].endswith(b"\n")
    raw, pieces[-1] = list(pieces), pieces[-1] + b"\n"
    for split in ("train", "val"):
        expected = [p for p, r in zip(pieces, raw, strict=True) if is_held(r) == (split == "val")]
        assert text_of(corpus, split) == b"".join(expected)


def test_documents_end_with_the_reserved_id(tmp_path):
    """Oracle: one such id per document and no newline added."""
    path = write_rows(tmp_path / "t.jsonl")
    tokenizer = with_end()
    config = DataConfig(source="local", path=str(path), stream=True, val_fraction=SHARE)
    corpus = prepare_corpus(config, tokenizer)
    ids = np.concatenate([corpus.tokens("train"), corpus.tokens("val")])
    assert (ids == tokenizer.document_end).sum() == len(ROWS)
    parts = text_of(corpus, "train").decode().split("<|endoftext|>")
    assert parts[:-1] == [row for row in ROWS if not is_held(row.encode())]


@pytest.mark.parametrize("budget", [1, 699, 1000])
@pytest.mark.parametrize("kind", ["byte", "end"])
def test_budget_is_exact(tmp_path, budget, kind):
    """Oracle: the first ids of the whole corpus."""
    path = write_rows(tmp_path / "t.jsonl")
    tokenizer = with_end() if kind == "end" else None
    settings = {"source": "local", "path": str(path), "stream": True, "val_fraction": SHARE}
    whole = prepare_corpus(DataConfig(**settings), tokenizer)
    # The first document may be a training one: budget 1 would leave nothing held out.
    held_first = [*sorted(ROWS, key=lambda row: not is_held(row.encode()))]
    if budget == 1:
        write_rows(path, held_first)
        whole = prepare_corpus(DataConfig(**settings), tokenizer)
    corpus = prepare_corpus(DataConfig(**settings, max_tokens=budget), tokenizer)
    assert corpus.num_tokens("train") == budget
    assert np.array_equal(corpus.tokens("train"), whole.tokens("train")[:budget])
    ids = [i for i in corpus.tokens("train").tolist() if i != corpus.tokenizer.document_end]
    assert corpus.meta["train_bytes"] == len(corpus.tokenizer.decode_bytes(ids))


class Interrupt(Exception):
    """Stands for Ctrl-C, a full disk, a lost connection."""


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
@pytest.mark.parametrize("after", [1, 30, 77])
def test_interrupted_preparation_continues_exactly(tmp_path, monkeypatch, suffix, after):
    """Oracle: the files of an uninterrupted preparation, byte for byte."""
    path = write_rows(tmp_path / f"t{suffix}", ROWS * 3)
    settings = {"tokenizer": "byte", "max_tokens": 12000}
    expected = prepare(path, "other", **settings)
    write, count, reads = streaming._Preparation._write, [0], []

    def failing(self, *args):
        count[0] += 1
        if count[0] == after:
            raise Interrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(streaming._Preparation, "_write", failing)
        with pytest.raises(Interrupt):
            prepare(path, **settings)
    final = expected.directory
    partial = partial_path(tmp_path / "cache" / "corpora" / final.name)
    assert partial.is_dir()
    assert not (partial.parent / final.name).exists()
    with (partial / "train.bin").open("ab") as stream:
        stream.write(b"written after the last position")
    read = documents.DocumentReader.__iter__

    def counting(self):
        for row in read(self):
            reads.append(row)
            yield row

    monkeypatch.setattr(documents.DocumentReader, "__iter__", counting)
    corpus = prepare(path, **settings)
    for name in ("tokens.bin", "meta.json", "tokenizer.json"):
        assert (corpus.directory / name).read_bytes() == (final / name).read_bytes()
    assert not partial.exists()
    if after > 70:
        assert len(reads) < expected.meta["documents"]


def test_damaged_progress_starts_over(tmp_path, monkeypatch):
    """Oracle: the same files as ever; a state that promises more than there is is not believed."""
    path = write_rows(tmp_path / "t.jsonl")
    expected = prepare(path, "other")
    with monkeypatch.context() as patch:
        patch.setattr(streaming._Preparation, "_finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(path)
    partial = partial_path(tmp_path / "cache" / "corpora" / expected.directory.name)
    (partial / "train.bin").write_bytes(b"short")
    corpus = prepare(path)
    assert text_of(corpus, "train") == text_of(expected, "train")


def _prepare_in_process(path, queue):
    queue.put(prepare(path).meta["tokens_sha256"])


def test_processes_share_one_preparation(tmp_path):
    """Oracle: two ranks that start together get the same corpus, and nothing is left over."""
    path = write_rows(tmp_path / "t.jsonl", ROWS * 4)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_prepare_in_process, args=(path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    hashes = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert hashes == {prepare(path).meta["tokens_sha256"]}
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


def test_memory_is_bounded(tmp_path, monkeypatch):
    """Oracle: Python's and numpy's own allocations stay far below the size of the text."""
    monkeypatch.setattr(streaming, "SHARD_TOKENS", 1 << 20)
    monkeypatch.setattr(streaming, "BATCH_BYTES", 1 << 16)
    monkeypatch.setattr(documents, "PIECE_BYTES", 1 << 16)
    path = tmp_path / "large.txt"
    with path.open("w") as stream:
        for start in range(0, 400_000, 10_000):
            stream.write("".join(f"line {i} of a text\n" for i in range(start, start + 10_000)))
    tracemalloc.start()
    try:
        corpus = prepare(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.num_tokens("train") + corpus.num_tokens("val") == path.stat().st_size
    assert peak < path.stat().st_size / 2


def test_prepared_stream_is_opened_without_reading_the_text(tmp_path, monkeypatch):
    """Oracle: names, sizes and times identify the files; a changed file is another corpus."""
    path = write_rows(tmp_path / "t.jsonl")
    first = prepare(path)
    monkeypatch.setattr(documents.DocumentReader, "__iter__", lambda self: 1 / 0)
    assert prepare(path).directory == first.directory
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ZeroDivisionError):
        prepare(path)


def test_bpe_is_trained_on_the_beginning(tmp_path):
    """Oracle: exact text, fewer ids than bytes."""
    corpus = prepare(write_rows(tmp_path / "t.jsonl"), tokenizer="bpe", vocab_size=300)
    assert corpus.tokenizer.kind == "bpe"
    assert corpus.num_tokens("train") < corpus.meta["train_bytes"]
    expected = "".join(row + "\n" for row in ROWS if not is_held(row.encode()))
    assert text_of(corpus, "train").decode() == expected


def test_binary_stream_is_exact(tmp_path):
    """Oracle: every byte, no newline added."""
    data = bytes(range(256)) * 20
    (tmp_path / "x.bin").write_bytes(data)
    corpus = prepare(tmp_path / "x.bin", source="bytes")
    assert corpus.num_tokens("train") + corpus.num_tokens("val") == len(data)


def test_nothing_held_out_is_an_error_that_leaves_nothing(tmp_path):
    """Oracle: one line with the remedies; the cache folder is empty."""
    path = write_rows(tmp_path / "t.jsonl", ["one"])
    with pytest.raises(DataError, match=r"1 documents.*data\.val_fraction.*data\.stream=false"):
        prepare(path, val_fraction=0.001)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"line\n" * 100 + b"ab\x00cd\n", r"NUL byte at offset 502"),
        (b"line\n" * 100 + b"ab\xffcd\n", r"0xff at offset 502 is not UTF-8"),
        (b"line\n" * 100 + "\u6f22".encode()[:2], r"0xe6 at offset 500 is not UTF-8"),
    ],
)
def test_bad_bytes_are_found_at_their_offset(tmp_path, data, expected):
    """Oracle: the offset in the file, also beyond the first piece."""
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(DataError, match=expected):
        prepare(tmp_path / "t.txt")
    with pytest.raises(DataError, match=expected):
        prepare(tmp_path / "t.txt", stream=False)


def test_reading_error_says_what_is_kept(tmp_path):
    """Oracle: the documents of the last shard before the bad row; mended, it is complete."""
    path = write_rows(tmp_path / "t.jsonl")
    lines = path.read_text().splitlines()
    broken = [*lines[:100], '{"text": 5}', *lines[100:]]
    good = [*lines[:100], '{"text": "5"}', *lines[100:]]
    path.write_text("\n".join(broken))
    with pytest.raises(DataError, match=r"cannot be read|expected text"):
        prepare(path, val_fraction=0.1)
    (tmp_path / "b.txt").write_bytes(b"line of text\n" * 400 + b"\xff\n")
    with pytest.raises(DataError, match=r"0xff.*documents are prepared: the same command"):
        prepare(tmp_path / "b.txt")
    path.write_text("\n".join(good))
    assert prepare(path).meta["documents"] == len(good)


def test_byte_budget_ends_with_a_whole_document(tmp_path):
    """Oracle: the fewest rows that reach it."""
    path = write_rows(tmp_path / "t.jsonl")
    sizes = np.cumsum([len(row.encode()) + 1 for row in ROWS])
    corpus = prepare(path, max_bytes=2000)
    assert corpus.meta["documents"] == int(np.argmax(sizes >= 2000)) + 1


def test_counts_of_training_tokens(tmp_path, monkeypatch):
    """Oracle: counting all at once; pieces must add up."""
    corpus = prepare(write_rows(tmp_path / "t.jsonl"))
    expected = np.bincount(corpus.tokens("train"), minlength=256)
    monkeypatch.setattr("common.corpus._COUNTED_AT_ONCE", 17)
    assert np.array_equal(corpus.token_counts(), expected)


@pytest.mark.parametrize("name", ["fineweb", "fineweb_edu"])
def test_hub_without_network_names_the_local_path(name):
    """Oracle: one line that says which setting takes a local copy."""
    with pytest.raises(DataError, match=r"local copy with data\.path=FILE") as caught:
        prepare_corpus(DataConfig(source=name, stream=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_tokens": 10}, "data.stream=true"),
        ({"max_tokens": 0, "stream": True}, "above 0"),
        ({"stream": True, "source": "shakespeare"}, "data.stream=false"),
        ({"stream": True, "tokenizer": "char"}, "data.stream=false"),
        ({"tokenizer_path": "x"}, "data.tokenizer=bpe"),
    ],
)
def test_impossible_settings(settings, expected):
    """Oracle: refused before anything is read."""
    with pytest.raises(ConfigError, match=expected):
        DataConfig(**settings)
