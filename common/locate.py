"""Where a bundle is: a directory, the run that made it, or a model shipped with the package.

Shipped models are package data (``common/shipped/NAME``) and are never written to.
"""

from pathlib import Path

from common import files
from common.bundle_format import MANIFEST
from common.checkpoints import is_checkpoint
from common.errors import BundleError

SHIPPED_FOLDER = Path(__file__).parent / "shipped"
SHIPPED_BYTES = 6_000_000
"""A shipped model is at most this large: it is part of every installation."""


def shipped_bundles() -> dict[str, Path]:
    """Return the names of the shipped models and their directories."""
    found = sorted(SHIPPED_FOLDER.glob(f"*/{MANIFEST}"))
    return {path.parent.name: path.parent for path in found}


def is_shipped(path: Path) -> bool:
    """Return whether a directory is inside the package's folder of shipped models."""
    return SHIPPED_FOLDER.resolve() in path.resolve().parents


def resolve_bundle(name: str | Path) -> Path:
    """Return the directory of a bundle: given itself, by its run directory, or by its name.

    A directory wins over a shipped model of the same name.

    Raises:
        BundleError: when there is none, saying what would help.
    """
    if not isinstance(name, str | Path):
        raise BundleError(
            f"bundle={name}: expected a directory or a shipped model's name; give a folder that "
            "lipllm train wrote (a number as ./5)"
        )
    shipped = shipped_bundles()
    for candidate in (Path(name).expanduser().resolve(), shipped.get(str(name))):
        for path in (candidate, candidate / "bundle") if candidate else ():
            if not is_shipped(path):
                files.recover_directory(path)
            if (path / MANIFEST).is_file():
                return path
    if is_checkpoint(name):
        raise BundleError(
            f"bundle={name}: a checkpoint of transformers, expected a bundle; only lipllm "
            "compress, calibrate and generate read checkpoints; give the folder of a bundle"
        )
    if Path(name).is_dir():
        raise BundleError(
            f"bundle={name}: no {MANIFEST} in it, so it is not a finished bundle; give the folder "
            "that lipllm train or lipllm compress wrote"
        )
    names = ", ".join(shipped) or "none in this installation"
    raise BundleError(
        f"bundle={name}: no such directory and no shipped model of that name (shipped: {names}); "
        "make one with: lipllm train"
    )
