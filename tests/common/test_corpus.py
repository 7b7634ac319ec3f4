"""Corpora: every source, exact splits, reuse and repair of the cache, errors in one line."""

import errno
import json
import os
import stat
import sys

import numpy as np
import pytest

from common import files, sources
from common.corpus import DataConfig, prepare_corpus
from common.errors import BackendError, ConfigError, DataError
from common.packing import entropy_bits, hold_out
from common.tokenizer import ByteTokenizer, CharTokenizer

TEXT = "".join(f"line {i}: the quick brown \u00e9\u6f22 fox\n" for i in range(300))
# Sum of -p log2 p is exact in float64 up to a few roundings.
EXACT = 1e-12


def prepare(path, **settings):
    """Prepare a local corpus."""
    return prepare_corpus(DataConfig(**({"source": "local", "path": str(path)} | settings)))


def write(path, data):
    """Write text or bytes and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def whole(corpus):
    """Return all bytes of a corpus, training part first."""
    parts = [corpus.tokenizer.decode_bytes(corpus.tokens(split)) for split in ("train", "val")]
    return b"".join(parts)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("byte", "uint8"), ("char", "uint8"), ("bpe", "uint16")]
)
def test_single_file_is_split_at_its_end(tmp_path, kind, dtype):
    """Oracle: both parts together are the file; the cut is between characters."""
    corpus = prepare(write(tmp_path / "a.txt", TEXT), tokenizer=kind, val_fraction=0.2)
    data = TEXT.encode()
    assert whole(corpus) == data
    val = corpus.tokenizer.decode_bytes(corpus.tokens("val"))
    assert abs(len(val) - 0.2 * len(data)) <= 3
    val.decode()
    assert corpus.tokens("val").dtype == dtype
    assert isinstance(corpus.tokens("train"), np.memmap)
    assert corpus.bytes_per_token == len(val) / len(corpus.tokens("val"))
    assert corpus.num_tokens("train") + corpus.num_tokens("val") == len(corpus._ids)
    counts = np.bincount(np.frombuffer(val, np.uint8))
    share = counts[counts > 0] / len(val)
    expected = -(share * np.log2(share)).sum()
    assert corpus.unigram_entropy_bits == pytest.approx(expected, abs=EXACT)
    assert "last 20 %" in corpus.describe()["split_rule"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_ends_are_kept(tmp_path, ending):
    """Oracle: the file's own bytes."""
    data = ("a" + ending) * 100
    assert whole(prepare(write(tmp_path / "a.txt", data))) == data.encode()


def test_directory_holds_out_whole_documents(tmp_path):
    """Oracle: each document is wholly in one part, whatever the files are called."""
    documents = [f"document {i} " * 20 + "\n" for i in range(40)]
    for index, text in enumerate(documents):
        write(tmp_path / "one" / "sub" / f"{index:03}.txt", text)
        write(tmp_path / "two" / f"{(index * 7) % 40:03}.txt", text)
    write(tmp_path / "one" / ".hidden" / "x.txt", "\x00")
    one, two = prepare(tmp_path / "one"), prepare(tmp_path / "two")
    val = one.tokenizer.decode(one.tokens("val"))
    held = [text for text in documents if text in val]
    assert "".join(held) == val
    assert 0.05 * len(whole(one)) <= len(val) <= 0.1 * len(whole(one))
    other = two.tokenizer.decode(two.tokens("val"))
    assert sorted(text for text in documents if text in other) == sorted(held)


def test_documents_without_final_newline_get_one():
    """Oracle: documents do not run into one another; a single text is left as it is."""
    train, val, _ = hold_out([b"ab", b"cd\n"], 0.5, whole_documents=False)
    assert train + val == b"ab\ncd\n"
    train, val, _ = hold_out([b"abcd"], 0.5, whole_documents=True)
    assert (train, val) == (b"ab", b"cd")


def test_entropy_of_known_distributions():
    """Oracle: uniform bytes have 8 bits, a constant none."""
    assert entropy_bits(bytes(range(256))) == pytest.approx(8.0, abs=EXACT)
    assert entropy_bits(b"aaaa") == 0.0
    assert entropy_bits(b"aabb") == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tables_and_their_columns(tmp_path, suffix):
    """Oracle: the rows joined; another column by name; a missing one lists what there is."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"body": f"row {i} of the table \u00e9\u6f22", "n": i} for i in range(30)]
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, "\n".join(json.dumps(row) for row in rows))
    corpus = prepare(path, column="body")
    assert sorted(whole(corpus).decode().splitlines()) == sorted(row["body"] for row in rows)
    with pytest.raises(DataError, match=r"no column 'text', found body, n; set data\.column"):
        prepare(path)
    with pytest.raises(DataError, match="'n' holds int"):
        prepare(path, column="n")
    with pytest.raises(DataError, match="cannot be read"):
        prepare(write(tmp_path / f"bad{suffix}", b"PAR1 {nonsense"))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("empty.txt", b"", "the file is empty"),
        ("nul.txt", b"ab\x00cd", r"NUL byte at offset 2.*data\.source=bytes data\.tokenizer=byte"),
        ("bad.txt", b"ab\xffcd", r"0xff at offset 2.*data\.source=bytes"),
    ],
)
def test_unusable_files_are_named(tmp_path, name, data, expected):
    """Oracle: one line with the file, the reason and the remedy; nothing is left in the cache."""
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=expected) as caught:
        prepare(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / ".cache").exists()


def test_binary_is_fine_as_bytes(tmp_path):
    """Oracle: every byte of the file, split at the end, no newline added."""
    data = bytes(range(256)) * 8
    corpus = prepare(write(tmp_path / "x.bin", data), source="bytes")
    assert whole(corpus) == data
    assert corpus.num_tokens("val") == round(0.1 * len(data))


def test_missing_and_mixed_paths(tmp_path):
    """Oracle: the message names the path and what would help."""
    with pytest.raises(DataError, match=r"data\.path=.*nope: no such file"):
        prepare(tmp_path / "nope")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        prepare(tmp_path / "hollow")
    write(tmp_path / "mix" / "a.txt", "a")
    write(tmp_path / "mix" / "b.jsonl", "{}")
    with pytest.raises(DataError, match="mixes json and text"):
        prepare(tmp_path / "mix")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    """Oracle: the system's reason in one line."""
    path = write(tmp_path / "a.txt", TEXT)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        prepare(path)


def test_reading_error_is_a_data_error(tmp_path, monkeypatch):
    """Oracle: an I/O error while reading names the file."""
    path = write(tmp_path / "a.txt", TEXT)

    def broken(self, *args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(path), "open", broken)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Input/output error\)"):
        prepare(path)


def test_too_short_for_a_context(tmp_path):
    """Oracle: the split, its tokens and the needed number are named."""
    corpus = prepare(write(tmp_path / "a.txt", "x" * 100))
    corpus.require(9)
    with pytest.raises(DataError, match=r"10 val tokens, expected at least 11 .* context of 10"):
        corpus.require(10)
    with pytest.raises(DataError, match="val tokens"):
        corpus.windows("val", 64)


def test_windows_are_disjoint_and_complete(tmp_path):
    """Oracle: inputs tile the split, each target is the next input, a limit spreads evenly."""
    corpus = prepare(write(tmp_path / "a.txt", TEXT), val_fraction=0.5)
    ids = np.asarray(corpus.tokens("val"), dtype=np.int64)
    windows = corpus.windows("val", 16)
    assert windows.shape == ((len(ids) - 1) // 16, 17)
    assert np.array_equal(windows[:, :-1].reshape(-1), ids[: windows.shape[0] * 16])
    assert np.array_equal(windows[:-1, -1], windows[1:, 0])
    few = corpus.windows("val", 16, 5)
    assert few.shape == (5, 17)
    assert np.array_equal(few[0], windows[0])
    assert np.array_equal(few[-1], windows[-1])


def test_max_bytes_cuts_between_characters(tmp_path):
    """Oracle: a prefix of the text, at most that long, still UTF-8."""
    path = write(tmp_path / "a.txt", "\u6f22" * 100)
    assert whole(prepare(path, max_bytes=100)) == ("\u6f22" * 33).encode()


def test_cache_is_reused_without_datasets(tmp_path, monkeypatch):
    """Oracle: a second preparation opens the files and needs no ``datasets``."""
    path = write(tmp_path / "a.txt", TEXT)
    first = prepare(path)
    stamp = (first.directory / "tokens.bin").stat().st_mtime_ns
    monkeypatch.setitem(sys.modules, "datasets", None)
    second = prepare(path)
    assert second.directory == first.directory
    assert (second.directory / "tokens.bin").stat().st_mtime_ns == stamp
    assert second.sha256 == first.sha256
    with pytest.raises(BackendError, match="pip install datasets"):
        prepare(path, val_fraction=0.3)
    write(path, TEXT + "more")
    with pytest.raises(BackendError):
        prepare(path)


@pytest.mark.parametrize("name", ["tokens.bin", "meta.json", "tokenizer.json"])
def test_damaged_cache_is_prepared_again(tmp_path, name, caplog):
    """Oracle: a flipped byte is noticed, said once, and repaired."""
    path = write(tmp_path / "a.txt", TEXT)
    first = prepare(path)
    file = first.directory / name
    file.write_bytes(b"!" + file.read_bytes()[1:])
    again = prepare(path)
    assert whole(again) == TEXT.encode()
    assert "preparing it again" in caplog.text


def test_full_disk_leaves_no_rubbish(tmp_path, monkeypatch):
    """Oracle: one line with the remedy; the cache folder holds nothing."""
    path = write(tmp_path / "a.txt", TEXT)

    def full(target, data):
        target.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(DataError, match=r"No space left on device.*data\.cache=DIR"):
        prepare(path)
    assert list((tmp_path / ".cache" / "corpora").iterdir()) == []


def test_tokenizer_of_a_model_is_used(tmp_path):
    """Oracle: the given tokenizer's ids; text outside its alphabet is refused."""
    path = write(tmp_path / "a.txt", "abc" * 100)
    corpus = prepare_corpus(DataConfig(source="local", path=str(path)), CharTokenizer("abcd"))
    assert corpus.tokens("train")[:3].tolist() == [0, 1, 2]
    other = prepare_corpus(DataConfig(source="local", path=str(path)), ByteTokenizer())
    assert other.tokens("train")[:3].tolist() == [97, 98, 99]
    with pytest.raises(DataError, match="'c'"):
        prepare_corpus(DataConfig(source="local", path=str(path)), CharTokenizer("ab"))


def test_stdlib_is_real_text_without_tests():
    """Oracle: ranges that hold for every supported Python, and what must not be in it."""
    found = sources.stdlib_files()
    names = {path.relative_to(found.root).as_posix() for path in found.paths}
    assert {"abc.py", "json/decoder.py"} <= names
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip"}
    assert list(found.paths) == sorted(
        found.paths, key=lambda p: p.relative_to(found.root).as_posix()
    )
    corpus = prepare_corpus(DataConfig(max_bytes=2_000_000))
    assert corpus.sha256
    assert 4.0 < corpus.unigram_entropy_bits < 5.5
    assert "documents held out" in corpus.describe()["split_rule"]


def test_hub_without_network_names_the_local_path():
    """Oracle: one line that says which setting takes a local copy."""
    for source in ("shakespeare", "wikitext", "fineweb"):
        with pytest.raises(DataError, match=r"local copy with data\.path=FILE") as caught:
            prepare_corpus(DataConfig(source=source))
        assert "\n" not in str(caught.value)


def test_named_corpus_from_a_file(tmp_path):
    """Oracle: ``data=shakespeare data.path=FILE`` is the file, its end held out."""
    corpus = prepare(write(tmp_path / "s.txt", TEXT), source="shakespeare", tokenizer="char")
    assert whole(corpus) == TEXT.encode()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"source": "moon"}, "one of stdlib"),
        ({"source": "local"}, "data.path=FILE"),
        ({"source": "hub"}, "data.name"),
        ({"path": "x"}, "data=local"),
        ({"tokenizer": "spell"}, "byte, char, bpe"),
        ({"val_fraction": 0.0}, "above 0"),
        ({"val_fraction": 0.9}, "at most 0.5"),
        ({"max_bytes": -1}, "above 0"),
        ({"max_bytes": "many"}, "max_bytes"),
    ],
)
def test_impossible_settings(settings, expected):
    """Oracle: refused before anything is read."""
    with pytest.raises(ConfigError, match=expected):
        DataConfig(**settings)


def test_unwritable_cache(tmp_path):
    """Oracle: a file where the cache folder should be."""
    path = write(tmp_path / "a.txt", TEXT)
    write(tmp_path / "blocked", "x")
    with pytest.raises(DataError, match=r"data\.cache=blocked"):
        prepare(path, cache="blocked")


def test_prepared_files_are_readable_by_others(tmp_path):
    """Oracle: a staged folder must not keep the temporary folder's private mode."""
    corpus = prepare(write(tmp_path / "a.txt", TEXT))
    assert stat.S_IMODE(corpus.directory.stat().st_mode) == 0o755
