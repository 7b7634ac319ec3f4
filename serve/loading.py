"""What can be served: bundles of ours, and checkpoints of ``transformers``."""

from pathlib import Path

import torch

from common.bundle import Bundle, load_bundle
from common.bundle_format import MANIFEST
from common.checkpoints import is_checkpoint
from common.errors import ConfigError
from serve.hugging_face import Checkpoint, load_checkpoint

Served = Bundle | Checkpoint


def load_served(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    stats: str | Path | None = None,
) -> Served:
    """Load a bundle, or a checkpoint of ``transformers``.

    Args:
        path: Directory, or the name of a shipped model. A folder with a bundle's manifest is one.
        device: Where the model goes.
        dtype: Type in which a checkpoint's weights are loaded; a bundle's stay as they are.
        stats: File with a checkpoint's statistics; by default those in its folder.

    Raises:
        LipError: as ``load_bundle`` and ``serve.hugging_face.checkpoint.load_checkpoint`` do.
    """
    if isinstance(path, str | Path):
        folder = Path(path).expanduser()
        if is_checkpoint(folder) and not (folder / MANIFEST).is_file():
            given = None if stats is None else Path(stats).expanduser()
            return load_checkpoint(folder, device=device, dtype=dtype, stats=given)
    if stats is not None:
        raise ConfigError(
            f"kv_stats={stats}: a bundle holds its own statistics; leave it out, and run "
            "lipllm calibrate bundle=DIR"
        )
    return load_bundle(path, device=device)
