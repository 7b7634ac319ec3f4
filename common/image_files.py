"""Files of images: CIFAR-10's binary version, npz arrays, parquet tables, and the hub.

Every reader returns ``(pixels, labels)`` of the training and of the test part: pixels (N, ...) as
uint8 or floats, colour last, and integer labels (N,).
"""

import io
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BackendError, DataError
from common.hub import datasets_library, require_host

Part = tuple[np.ndarray, np.ndarray]
_ROW = 1 + 3 * 32 * 32
_BINARY = ("data_batch_1.bin", "test_batch.bin")
_NPZ = ("x_train", "y_train", "x_test", "y_test")
# A label far beyond the number of classes would become a matrix with as many rows.
_MOST_CLASSES = 65536
# What numpy raises for an empty file, a single array under another name, and damaged bytes.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)
_FORMATS = (
    "expected a folder with data_batch_*.bin and test_batch.bin or with train*.parquet and "
    "test*.parquet, or an npz file"
)


def read_path(path: Path) -> tuple[Part, Part]:
    """Read images from a folder or file, see ``ImageConfig.path``.

    Raises:
        DataError: naming what is missing, damaged or of another kind.
        BackendError: when a parquet table needs a package that is not installed.
    """
    if not path.exists():
        raise DataError(f"data.path={path}: no such file or directory; correct the path")
    if path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"data.path={path}: {_FORMATS}")
        return _checked(path, read_npz(path))
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    for folder in folders:
        if all((folder / name).is_file() for name in _BINARY):
            return _checked(folder, read_binary(folder))
        if list(folder.glob("train*.parquet")) and list(folder.glob("test*.parquet")):
            return _checked(folder, read_parquet(folder))
    if any((folder / "data_batch_1").is_file() for folder in folders):
        raise DataError(
            f"data.path={path}: holds CIFAR-10's Python version, whose pickles could run code; "
            "give the binary version (data_batch_*.bin)"
        )
    raise DataError(f"data.path={path}: {_FORMATS}")


def read_binary(folder: Path) -> tuple[Part, Part]:
    """Read CIFAR-10's binary version: rows of a label byte and 3 x 32 x 32 colour planes."""
    train = [_rows(file) for file in sorted(folder.glob("data_batch_*.bin"))]
    images, labels = zip(*train, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), _rows(folder / _BINARY[1])


def read_npz(path: Path) -> tuple[Part, Part]:
    """Read the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an npz file."""
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in _NPZ)
    except KeyError:
        raise DataError(f"data.path={path}: expected arrays {', '.join(_NPZ)} in it") from None
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.path={path}: cannot be read ({reason}); write it again with numpy.savez"
        ) from None
    return (x_train, y_train.reshape(-1)), (x_test, y_test.reshape(-1))


def read_parquet(folder: Path) -> tuple[Part, Part]:
    """Read tables with an image column (``img`` or ``image``) and a ``label`` column."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise BackendError("parquet images need pyarrow: pip install datasets") from None
    parts = []
    for split in ("train", "test"):
        rows: list[dict[str, Any]] = []
        for file in sorted(folder.glob(f"{split}*.parquet")):
            try:
                rows += parquet.read_table(file).to_pylist()
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"{file}: cannot be read ({reason}); fetch it again") from None
        parts.append(_decoded(rows, str(folder)))
    return parts[0], parts[1]


def read_hub(name: str) -> tuple[Part, Part]:
    """Load the splits ``train`` and ``test`` of a data set on the hub through ``datasets``.

    Raises:
        DataError: when it cannot be reached.
        BackendError: when ``datasets`` is not installed.
    """
    datasets = datasets_library("reading images from the hub")
    parts = []
    try:
        require_host(datasets.config.HF_ENDPOINT, offline=datasets.config.HF_HUB_OFFLINE)
        for split in ("train", "test"):
            parts.append(_decoded(datasets.load_dataset(name, split=split), name))
    except (DataError, BackendError):
        raise
    except Exception as error:  # datasets raises classes of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"hub data set {name!r} cannot be read ({reason}); give a local copy with "
            "data.path=FOLDER (CIFAR-10's binary version, parquet or npz)"
        ) from error
    return parts[0], parts[1]


def _decoded(rows: Iterable[dict[str, Any]], where: str) -> Part:
    """Decode encoded images (a PIL image, or ``{"bytes": ...}``) with their labels."""
    images, labels = [], []
    for row in rows:
        value = row.get("img", row.get("image"))
        if value is None or "label" not in row:
            found = ", ".join(row)
            raise DataError(f"{where}: expected columns img (or image) and label, found {found}")
        if not isinstance(row["label"], int):
            raise DataError(
                f"{where}: label {row['label']!r}: expected a whole number; number the classes "
                "from 0"
            )
        images.append(np.asarray(_decode(value["bytes"]) if isinstance(value, dict) else value))
        labels.append(row["label"])
    if not images or len({image.shape for image in images}) > 1:
        raise DataError(f"{where}: expected images of one size, found none or several sizes")
    return np.stack(images), np.asarray(labels)


def _decode(data: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise BackendError("encoded images need Pillow: pip install pillow") from None
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"an image cannot be decoded ({error}); fetch the files again") from None


def _rows(file: Path) -> Part:
    data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if not len(data) or len(data) % _ROW:
        raise DataError(f"{file}: {len(data)} bytes, expected a multiple of {_ROW}; fetch it again")
    rows = data.reshape(-1, _ROW)
    # Planes to colour last, as the published results flatten them.
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _checked(path: Path, parts: tuple[Part, Part]) -> tuple[Part, Part]:
    shapes = {pixels.shape[1:] for pixels, _ in parts}
    is_paired = all(
        pixels.ndim > 0 and pixels.size > 0 and len(pixels) == len(labels)
        for pixels, labels in parts
    )
    if not is_paired or len(shapes) > 1:
        sizes = [(pixels.shape, labels.shape) for pixels, labels in parts]
        raise DataError(
            f"data.path={path}: expected images of one size with labels, got {sizes}; correct the "
            "arrays"
        )
    for pixels, labels in parts:
        if pixels.dtype.kind not in "buif":
            raise DataError(
                f"data.path={path}: pixels of type {pixels.dtype}: expected bytes, or numbers from "
                "0 to 1; convert them"
            )
        is_whole = np.issubdtype(labels.dtype, np.integer)
        if not is_whole or labels.min() < 0 or labels.max() >= _MOST_CLASSES:
            found = f"{labels.min()} to {labels.max()}" if is_whole else str(labels.dtype)
            raise DataError(
                f"data.path={path}: labels {found}: expected whole numbers from 0 on, below "
                f"{_MOST_CLASSES}; number the classes from 0"
            )
    return parts
