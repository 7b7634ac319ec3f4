"""The ``train`` command: data in, a trained and constrained model directory out."""

from typing import Any

from omegaconf import DictConfig

from common.config import build
from common.errors import ConfigError
from common.images import ImageConfig
from common.models import MLPConfig
from common.runs import Outcome, Run, hydra_command
from train.images import train_images
from train.language import train_language
from train.session import read_settings


def train(cfg: DictConfig, run: Run) -> Outcome:
    """Train a model and write its bundle.

    Args:
        cfg: Groups ``data model optim constraint schedule trainer callbacks logger``, ``seed``
            and ``device``; text goes with a transformer, images with an MLP.
        run: Where; a resumed run continues from its last checkpoint.

    Returns:
        Validation figures, speed and naive bound; the artifact ``bundle``; see
        ``train_language`` and ``train_images``.

    Raises:
        ConfigError, DataError: before anything is trained.
    """
    settings = read_settings(cfg)
    source = build(cfg.data)
    is_images = isinstance(source, ImageConfig)
    shape = _shape(cfg.model, is_images)
    if is_images:
        return train_images(cfg, source, shape, settings, run)
    return train_language(cfg, source, settings, run)


def _shape(node: Any, is_images: bool) -> Any:
    """Build the model's configuration, refusing one that does not fit the data."""
    is_mlp = str(node.get("_target_")).rpartition(".")[2] == MLPConfig.__name__
    if is_images and not is_mlp:
        raise ConfigError("data: images need an MLP; add model=mlp, or choose a text with data=")
    if is_mlp and not is_images:
        raise ConfigError("model=mlp: expected images; add data=digits or data=cifar10")
    return build(node) if is_mlp else build(node, vocab_size=256)


main = hydra_command("train", train)
