"""Several ranks against one: owners, exchange, DDP, row sharding, resume. Two gloo processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.bundle import load_bundle
from train.app import train
from train.exchange import assign_owners, update_cost

# Means over ranks and over micro-batches are summed in another order: float32 rounding, six steps.
ROUNDING = 1e-5
RANKS = Path(__file__).with_name("ranks.py")
ROOT = Path(__file__).parents[2]
TRAINED = ("ddp", "ddp-everything", "fsdp2")


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory, text_path):
    """What each rank found, and the folder of their runs."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks need two CPU cores")
    folder = tmp_path_factory.mktemp("ranks")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(folder), str(text_path)],
            cwd=folder,
            env=os.environ | common | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)], folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["replicas", "rows"])
def test_ranks_step_as_one_process_does(found, layout):
    """Oracle: plain Muon with the same gradients; ranks agree bit for bit."""
    ranks, _ = found
    assert ranks[0][layout]["end"] == ranks[1][layout]["end"]
    for rank in ranks:
        assert rank[layout]["plain"] < ROUNDING


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["replicas", "rows"])
def test_optimizer_state_is_shared_out_and_stored_whole(found, layout):
    """Oracle: the run that goes on; a plain Muon can load what two ranks stored."""
    ranks, _ = found
    for rank in ranks:
        assert rank[layout]["resumed"] == rank[layout]["end"]
        assert rank[layout]["alone"] < ROUNDING
        assert rank[layout]["stored"] == 8
        assert rank[layout]["held"] < 8
    # Six matrices, or all eight parameters, live on one rank each; two are repeated on both.
    assert sum(rank[layout]["held"] for rank in ranks) == {"replicas": 10, "rows": 8}[layout]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAINED)
def test_replicas_stay_equal_and_resume_bit_for_bit(found, name):
    """Oracle: the other rank, and the uninterrupted run."""
    ranks, _ = found
    ends = {rank[name][part]["weights"] for rank in ranks for part in ("whole", "resumed")}
    assert all(rank[name]["stopped"] for rank in ranks)
    assert len(ends) == 1
    assert ranks[0][name]["whole"]["metrics"]["train/steps"] == 6
    assert ranks[1][name]["whole"]["metrics"] == {}  # measured and proved once


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_train_what_one_process_trains(found, make_run, name):
    """Oracle: one process that accumulates as many windows; the bundles agree to rounding."""
    _, folder = found
    micro = 4 if name == "ddp-everything" else 2
    overrides = ["constraint=spectral_normalize", "trainer.max_steps=6", "trainer.batch_size=2"]
    overrides += [f"trainer.accumulate_grad_batches={micro}", "trainer.final_windows=8"]
    if name == "ddp":
        overrides += ["model.attn_residual=[0.5,0.0]"]
    else:
        overrides += ["trainer.ema=0.9"]
    if name == "ddp-everything":
        overrides += ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5"]
    alone = load_bundle(train(*make_run(*overrides)).artifacts["bundle"]).model.state_dict()
    together = load_bundle(folder / f"{name}-half" / "bundle").model.state_dict()
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=ROUNDING, atol=ROUNDING)


def test_owners_are_balanced_and_agreed():
    """Property: the largest load is at most 4/3 of the mean plus the largest item; all owned."""
    generator = torch.Generator().manual_seed(0)
    costs = (torch.rand(40, generator=generator) ** 3).tolist()
    owners = assign_owners(costs, 4)
    assert owners == assign_owners(list(costs), 4)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(4)]
    assert max(loads) <= 4 / 3 * max(sum(costs) / 4, *costs)
    assert assign_owners([1.0] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert assign_owners([], 2) == []


def test_cost_counts_the_products_of_a_matrix():
    """Oracle: m^2 n multiply-adds, both ways; heads cost less than the matrix; vectors nothing."""
    fixed = update_cost((0, 1))
    assert update_cost((8, 4)) - fixed == update_cost((4, 8)) - fixed == 128
    assert update_cost((8, 4), slices=4) - fixed == 4 * 2 * 2 * 4
    assert update_cost((1000,)) < fixed
