"""A bench that goes on belongs to the weights that it began with, not to their folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.bundle import save_bundle
from common.models import LipschitzTransformer, ModelConfig
from common.tokenizer import CharTokenizer

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[[str, int], Path]:
    """Write an untrained character model of a seed into a folder, replacing what is there."""

    def make(name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        config = ModelConfig(vocab_size=len(ALPHABET), width=16, layers=1, heads=2, context=64)
        model = LipschitzTransformer(config).eval().requires_grad_(False)
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return save_bundle(tmp_path / name, model, CharTokenizer(ALPHABET)).path

    return make


def test_rows_belong_to_weights_wherever_they_lie(
    lipllm: Callable, make_bundle: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """Oracle: other weights in the same folder are refused; the same weights elsewhere go on."""
    task = ("data=recall", "data.task.length=40", "data.task.needles=2", "data.max_bytes=20000")
    few = ("bench.policies=[window]", "bench.budgets=[0.25]", "bench.windows=2")
    run = (*task, *few, "bench.parts=[quality]", f"hydra.run.dir={tmp_path / 'run'}", "device=cpu")
    done = lipllm("bench", f"bundle={make_bundle('a', 0)}", *run)
    assert done.status == 0, done.err
    rows = (tmp_path / "run" / "bench.json").read_bytes()
    assert lipllm("bench", f"bundle={make_bundle('b', 0)}", *run).status == 0
    refused = lipllm("bench", f"bundle={make_bundle('a', 1)}", *run)
    assert refused.status == 2
    assert "rows of another model" in refused.err
    assert (tmp_path / "run" / "bench.json").read_bytes() == rows
