"""A killed training process: the same command resumes and ends with the same weights."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from common.bundle_format import WEIGHTS
from train.app import train

NANO = ("data=local", "model=nano", "device=cpu", "logger=csv", "trainer.batch_size=4")
NANO += ("callbacks.sample_every=0", "callbacks.certificate_every=0")
OVERRIDES = (
    "trainer.max_steps=40",
    "trainer.val_every=6",
    "trainer.val_windows=4",
    "trainer.final_windows=8",
    "callbacks.checkpoint_every=4",
)


def start(directory, text_path):
    """Start ``lipllm train`` in a directory of its own."""
    directory.mkdir(exist_ok=True)
    code = "import sys; from common.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", f"data.path={text_path}", *NANO, *OVERRIDES],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_after_first_validation(process, number):
    """Wait for the first validation's line, send the signal, return what else was printed."""
    with process:
        next(line for line in process.stdout if line.startswith("step "))
        process.send_signal(number)
        return process.stdout.read()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_process_resumes_bit_for_bit(tmp_path, text_path, make_run):
    """Oracle: the uninterrupted run in this process, with as many threads."""
    whole = train(*make_run(*OVERRIDES, directory="whole"))
    broken = tmp_path / "broken"
    stop_after_first_validation(start(broken, text_path), signal.SIGKILL)
    assert len(list(broken.glob("runs/train/*/checkpoints/last.ckpt"))) == 1
    with start(broken, text_path) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert "resuming" in output
    (bundle,) = broken.glob("runs/train/*/bundle")
    weights = (bundle / WEIGHTS).read_bytes()
    assert weights == (whole.artifacts["bundle"] / WEIGHTS).read_bytes()
