"""Images: whole, divided once, reproducible, read from every format, never unpickled."""

import io
import sys

import numpy as np
import pytest
import torch

from common.errors import BackendError, ConfigError, DataError
from common.images import ImageConfig, load_digits, load_images, with_label_noise

ROW = 3073


def test_digits_are_divided_without_overlap():
    """Oracle: the published size of the set, its ranges, and the unshuffled original."""
    images = load_digits(0.25, seed=3)
    assert images.train_NI.shape == (1348, 64)
    assert images.val_NI.shape == (449, 64)
    pixels = torch.cat([images.train_NI, images.val_NI])
    assert pixels.min() == 0
    assert pixels.max() == 1
    original = load_digits(0.5, seed=4)
    same = torch.cat([original.train_NI, original.val_NI])
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, same.tolist()))
    assert torch.bincount(images.train_labels_N, minlength=10).min() > 100
    assert (images.classes, images.inputs) == (10, 64)


def test_digits_follow_their_seed():
    """Oracle: equal seeds give equal data, others do not."""
    assert torch.equal(load_digits(seed=1).val_NI, load_digits(seed=1).val_NI)
    assert not torch.equal(load_digits(seed=1).val_NI, load_digits(seed=2).val_NI)


def test_digits_say_what_they_need(monkeypatch):
    """Oracle: a share that leaves nothing, and a blocked import."""
    for share in (0.0, 0.6):
        with pytest.raises(ConfigError, match="val_fraction"):
            load_digits(share)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BackendError, match="pip install scikit-learn"):
        load_digits()


def test_label_noise_makes_exactly_its_share_wrong():
    """Oracle: counting; every wrong class occurs, validation labels stay as they are."""
    clean = load_images(ImageConfig())
    noisy = load_images(ImageConfig(label_noise=0.25))
    wrong = noisy.train_labels_N != clean.train_labels_N
    assert int(wrong.sum()) == round(0.25 * len(wrong))
    shifts = (noisy.train_labels_N - clean.train_labels_N)[wrong] % 10
    assert set(shifts.tolist()) == set(range(1, 10))
    assert torch.equal(noisy.val_labels_N, clean.val_labels_N)
    labels_N = torch.arange(100) % 3
    assert torch.equal(with_label_noise(labels_N, 3, 0.0, 0), labels_N)
    assert bool((with_label_noise(labels_N, 3, 1.0, 0) != labels_N).all())
    first, again = (with_label_noise(labels_N, 3, 0.5, 7) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, with_label_noise(labels_N, 3, 0.5, 8))


def binary_rows(count, generator):
    """Return rows of CIFAR-10's binary version and what they mean (labels, HWC pixels)."""
    rows = generator.integers(0, 256, size=(count, ROW), dtype=np.uint8)
    rows[:, 0] = np.arange(count) % 10
    planes = rows[:, 1:].reshape(-1, 3, 32, 32)
    pixels = np.stack([planes[:, c] for c in range(3)], axis=-1)
    return rows, rows[:, 0], pixels


@pytest.fixture
def cifar(tmp_path):
    """A folder in the layout of CIFAR-10's binary version, with its content."""
    generator = np.random.default_rng(0)
    content = {}
    for name, count in (("data_batch_1", 7), ("data_batch_2", 5), ("test_batch", 10)):
        rows, labels, pixels = binary_rows(count, generator)
        folder = tmp_path / "cifar-10-batches-bin"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
        content[name] = (labels, pixels)
    return tmp_path, content


def test_binary_cifar_is_read_colour_last(cifar):
    """Oracle: planes put together by hand; the batches follow one another."""
    path, content = cifar
    images = load_images(ImageConfig(source="cifar10", path=str(path)))
    assert images.train_NI.shape == (12, 3072)
    assert (images.classes, images.val_NI.shape[0]) == (10, 10)
    expected = content["data_batch_2"][1].reshape(5, -1) / np.float32(255)
    assert np.array_equal(images.train_NI[7:].numpy(), expected.astype(np.float32))
    assert images.train_labels_N.tolist() == [*range(7), *range(5)]


def test_npz_and_parquet_give_the_same_images(cifar, tmp_path):
    """Oracle: the binary version of the same images."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    path, content = cifar
    wanted = load_images(ImageConfig(source="cifar10", path=str(path)))
    train = [
        np.concatenate(parts)
        for parts in zip(content["data_batch_1"], content["data_batch_2"], strict=True)
    ]
    parts = {"train": train, "test": content["test_batch"]}
    arrays = {f"{axis}_{split}": parts[split][i] for split in parts for i, axis in enumerate("yx")}
    np.savez(tmp_path / "images.npz", **arrays)
    folder = tmp_path / "tables"
    folder.mkdir()
    for split, (labels, pixels) in parts.items():
        encoded = []
        for one in pixels:
            buffer = io.BytesIO()
            image.fromarray(one).save(buffer, "PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": encoded, "label": labels.astype(np.int64)})
        parquet.write_table(table, folder / f"{split}-00000.parquet")
    for other in (tmp_path / "images.npz", folder):
        found = load_images(ImageConfig(source="local", path=str(other)))
        for name in ("train_NI", "train_labels_N", "val_NI", "val_labels_N"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (other, name)


def test_labels_of_tables_are_whole_numbers(tmp_path):
    """Oracle: a missing and a textual label are named in one line, before any image is decoded."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for label in (None, "cat"):
        table = pa.table({"img": [{"bytes": b"", "path": "x.png"}], "label": [label]})
        for split in ("train", "test"):
            parquet.write_table(table, tmp_path / f"{split}.parquet")
        with pytest.raises(DataError, match="expected a whole number") as caught:
            load_images(ImageConfig(source="local", path=str(tmp_path)))
        assert "\n" not in str(caught.value)


def test_bad_image_files_are_named(tmp_path, cifar):
    """Oracle: one line with the path for each kind of damage; pickles are refused."""
    path, _ = cifar

    def refused(where, match):
        with pytest.raises(DataError, match=match) as caught:
            load_images(ImageConfig(source="cifar10", path=str(where)))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "expected a folder with data_batch")
    (empty / "data_batch_1").write_bytes(b"pickle")
    refused(empty, "pickles could run code")
    (empty / "data_batch_1").unlink()
    bad = empty / "x.npz"
    np.savez(bad, x_train=np.zeros((2, 3)))
    refused(bad, "expected arrays x_train")
    np.savez(bad, x_train=np.full((2, 3), 7.0), y_train=[0, 1], x_test=np.zeros((1, 3)), y_test=[0])
    refused(bad, "numbers from 0 to 1")
    np.savez(bad, x_train=np.zeros((2, 3)), y_train=[0, 1, 1], x_test=np.zeros((1, 3)), y_test=[0])
    refused(bad, "images of one size with labels")
    bad.write_bytes(b"PK\x03\x04 no archive")
    refused(bad, "cannot be read")
    bad.write_bytes(b"")
    refused(bad, "cannot be read")
    with bad.open("wb") as single:
        np.save(single, np.zeros(3))
    refused(bad, "cannot be read")
    file = path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    refused(path, "multiple of 3073")


@pytest.mark.parametrize(
    ("pixels", "labels", "match"),
    [
        (np.float32(1), np.int64(1), "images of one size"),
        (np.zeros((2, 0)), np.array([0, 1]), "images of one size"),
        (np.full((2, 3), "a"), np.array([0, 1]), "pixels of type <U1"),
        (np.zeros((2, 3), dtype=complex), np.array([0, 1]), "pixels of type complex128"),
        (np.zeros((2, 3)), np.array([0, 10**10]), "labels 0 to 10000000000: expected whole"),
        (np.zeros((2, 3)), np.array([0, 2**64 - 1], dtype=np.uint64), "expected whole numbers"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), "labels float64: expected whole numbers"),
    ],
)
def test_arrays_that_are_no_images_are_named(tmp_path, pixels, labels, match):
    """Oracle: one line, before a label becomes a matrix of ten billion rows."""
    path = tmp_path / "x.npz"
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    with pytest.raises(DataError, match=match) as caught:
        load_images(ImageConfig(source="local", path=str(path)))
    assert "\n" not in str(caught.value)


def test_cifar_without_files_or_network_says_so():
    """Oracle: offline, the hub answers with one line and its remedy."""
    with pytest.raises(DataError, match=r"data\.path") as caught:
        load_images(ImageConfig(source="cifar10"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"data\.path=null"):
        ImageConfig(source="local")
    with pytest.raises(ConfigError, match="label_noise"):
        ImageConfig(label_noise=1.5)
    with pytest.raises(ConfigError, match="digits, cifar10, local"):
        ImageConfig(source="letters")
