"""Seeds every test of this folder and offers a tiny training run."""

import random
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from common.runs import Run, plain

NANO = (
    "data=local",
    "model=nano",
    "device=cpu",
    "logger=csv",
    "trainer.batch_size=4",
    "trainer.val_every=0",
)
NANO += ("trainer.final_windows=32", "callbacks.sample_every=0", "callbacks.certificate_every=0")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    """A file of 40 kB of English-like text."""
    generator = random.Random(0)
    words = ["the", "bound", "of", "a", "model", "is", "small", "and", "its", "proof", "travels"]
    text = " ".join(generator.choices(words, k=8000))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    return path


@pytest.fixture
def make_run(tmp_path, text_path):
    """Return a function from overrides to (configuration, run) of a nano training run."""

    def build(*overrides: str, directory: str = "run", resumed: bool = False):
        with initialize_config_module("conf", version_base="1.3"):
            common = [*NANO, f"data.path={text_path}", f"data.cache={tmp_path / 'cache'}"]
            cfg = compose("train", overrides=[*common, *overrides])
        path = tmp_path / directory
        path.mkdir(exist_ok=True)
        run = Run(
            command="train", directory=path, config=plain(cfg), config_hash="0", resumed=resumed
        )
        return cfg, run

    return build
