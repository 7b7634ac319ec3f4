"""Documents of one class and the rest."""

from pathlib import Path

import pytest

from common.corpus_config import DataConfig
from common.document_classes import document_classes
from common.documents import documents
from common.errors import DataError
from common.packing import held_documents, hold_out
from common.sources import local_files, stdlib_files

PLAY = "\n\n".join(
    f"{name}:\nLine {number} of {name.lower()}: well said,\nand again."
    for number in range(20)
    for name in ("ROMEO", "JULIET", "First Citizen")
)


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """Return a folder of 30 files in three packages, one empty and two without a last newline."""
    root = tmp_path / "texts"
    for index in range(30):
        path = root / ("one", "two/deep", "three")[index % 3] / f"file{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# file {index}\n" + f"x = {index}\n" * (index + 5) + "y" * (index % 2))
    (root / "one" / "empty.py").touch()
    (root / "json.py").write_text("# json\n" * 400)
    return DataConfig(source="local", path=str(root), val_fraction=0.3)


def _parts(config: DataConfig, name: str) -> tuple[bytes, bytes, bytes, bytes]:
    found = document_classes(config, name)
    return found.forget_train, found.forget_held, found.retain_train, found.retain_held


def test_parts_are_the_split_of_training(folder: DataConfig) -> None:
    """Oracle: ``hold_out`` of the corpus: the same bytes, file by file."""
    texts = list(documents(local_files(Path(folder.path), as_bytes=False), "text", None))
    train, held, rule = hold_out(texts, 0.3, whole_documents=True)
    found = document_classes(folder, "two")
    assert found.rule == rule
    assert found.is_unseen
    assert len(found.forget_train) + len(found.retain_train) == len(train)
    assert len(found.forget_held) + len(found.retain_held) == len(held)
    for text in (text for text in texts if b"file" in text):
        part = "held" if text in held else "train"
        name = "forget" if int(text.split()[2]) % 3 == 1 else "retain"
        assert text in getattr(found, f"{name}_{part}")


@pytest.mark.parametrize(
    "names",
    [
        ("two", "two/", "two/*", "two/deep", "two.deep"),
        ("json", "json.py"),
        ("one/file6", "one/file6.py"),
    ],
    ids=["folder", "module", "file"],
)
def test_names_that_mean_the_same(folder: DataConfig, names: tuple[str, ...]) -> None:
    """Oracle: equality of all parts."""
    first = _parts(folder, names[0])
    assert all(_parts(folder, name) == first for name in names[1:])


def test_a_class_without_held_out_files_keeps_its_end_apart(folder: DataConfig) -> None:
    """Oracle: the one file of the class, cut at 70 %; it is said that the model has seen it."""
    found = document_classes(folder, "json")
    assert not found.is_unseen
    assert "although it was trained on" in found.rule
    assert found.forget_train + found.forget_held == b"# json\n" * 400
    assert len(found.forget_held) == round(0.3 * 2800)


def test_a_file_that_is_part_of_a_held_out_one_was_trained_on(tmp_path: Path) -> None:
    """Oracle: its name; ``hold_out`` takes whole files, and of these two the large one."""
    (tmp_path / "small.txt").write_bytes(b"a line\n")
    (tmp_path / "other.txt").write_bytes(b"something else\n" * 40)
    (tmp_path / "large.txt").write_bytes(b"first\na line\n" * 30)
    config = DataConfig(source="local", path=str(tmp_path), val_fraction=0.393)
    texts = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert held_documents(texts, 0.393) == {0}
    found = document_classes(config, "small")
    assert found.retain_held == texts[0]
    assert (found.forget_train + found.forget_held, found.is_unseen) == (b"a line\n", False)


def test_bytes_are_divided_by_position(tmp_path: Path) -> None:
    """Oracle: two files without last newlines, the last tenth of all held out."""
    (tmp_path / "a.bin").write_bytes(b"a" * 500)
    (tmp_path / "b.bin").write_bytes(b"b" * 500)
    config = DataConfig(source="bytes", path=str(tmp_path), val_fraction=0.1)
    assert _parts(config, "b") == (b"b" * 400, b"b" * 100, b"a" * 500, b"")


def test_end_of_text_is_divided_by_position(tmp_path: Path) -> None:
    """Oracle: two files, too few to hold one out: the last tenth of all, inside the second."""
    (tmp_path / "a.txt").write_bytes(b"a" * 499 + b"\n")
    (tmp_path / "b.txt").write_bytes(b"b" * 499 + b"\n")
    config = DataConfig(source="local", path=str(tmp_path), val_fraction=0.1)
    assert _parts(config, "b") == (b"b" * 400, b"b" * 99 + b"\n", b"a" * 499 + b"\n", b"")


def test_speakers(tmp_path: Path) -> None:
    """Oracle: counting lines of the play; its end is held out."""
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    found = document_classes(DataConfig(source="shakespeare", path=str(path)), "ROMEO")
    assert (found.forget_train + found.forget_held).count(b"ROMEO:") == 20
    assert b"romeo" not in found.retain_train + found.retain_held
    assert b"JULIET" not in found.forget_train + found.forget_held
    assert found.retain_train.count(b"First Citizen:") > found.retain_held.count(b"First Citizen:")


@pytest.mark.parametrize("name", ["encodings", "pydoc_data/topics", "json", "xml.dom"])
def test_standard_library_has_packages(name: str) -> None:
    """Oracle: sizes of the interpreter's own files."""
    found = document_classes(DataConfig(), name)
    source = stdlib_files()
    prefix = name.replace(".", "/")
    size = sum(
        path.stat().st_size
        for path in source.paths
        if path.relative_to(source.root).as_posix().startswith((f"{prefix}/", f"{prefix}.py"))
    )
    assert len(found.forget_train) + len(found.forget_held) == pytest.approx(size, abs=200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jsn", r"unlearn\.forget=jsn: no such file or folder.*there is json"),
        ("four/*", "no such file or folder"),
        ("*", "not none or all of it"),
    ],
)
def test_impossible_classes_are_one_line(folder: DataConfig, name: str, message: str) -> None:
    """Oracle: the message names classes that exist."""
    with pytest.raises(DataError, match=message) as info:
        document_classes(folder, name)
    assert "\n" not in str(info.value)


def test_unknown_speakers_and_nameless_rows_are_one_line(tmp_path: Path) -> None:
    """Oracle: the speakers there are; rows of a table have no names."""
    path = tmp_path / "play.txt"
    path.write_text(PLAY)
    with pytest.raises(DataError, match=r"no such speaker.*First Citizen"):
        document_classes(DataConfig(source="local", path=str(path)), "HAMLET")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="its documents have no names"):
        document_classes(DataConfig(source="local", path=str(rows)), "a")
    with pytest.raises(DataError, match=r"data\.stream=true"):
        document_classes(DataConfig(source="local", path=str(path), stream=True), "a")
