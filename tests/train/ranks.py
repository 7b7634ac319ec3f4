"""What one of two processes does for ``test_sharding.py``: python ranks.py FOLDER TEXT.

Both run every check, the optimizer alone and whole training runs; each writes what it found.
"""

import copy
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from common.runs import Run, plain
from train.app import train
from train.callbacks import Checkpoint
from train.module import LipschitzModule
from train.optim import Muon
from train.sharding import ShardedMuon

# The last one never gets a gradient: it is frozen.
SHAPES = [(12, 20)] * 3 + [(16, 8)] * 2 + [(7, 9), (5,), (30, 6), (9, 4)]
COMMON = ("data=local", "model=nano", "device=cpu", "logger=csv", "trainer.batch_size=2")
COMMON += ("trainer.val_every=0", "trainer.final_windows=8", "callbacks.sample_every=0")
COMMON += ("callbacks.certificate_every=3", "trainer.devices=2", "trainer.max_steps=6")
COMMON += ("callbacks.checkpoint_every=3", "constraint=spectral_normalize")
EVERYTHING = ("trainer.ema=0.9", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5")
EVERYTHING += ("trainer.accumulate_grad_batches=2",)
# DDP must not wait for the gradients of a block that is left out.
DEAD_BLOCK = "model.attn_residual=[0.5,0.0]"
RUNS = {"ddp": (DEAD_BLOCK,), "ddp-everything": EVERYTHING, "fsdp2": ("trainer.ema=0.9",)}


def parameters(sharded):
    """Equal parameters in every process, and groups of every kind."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        params = [nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])) for p in params]
    kinds = ((3, "muon", "soft_cap"), (2, "muon", "spectral_normalize"), (1, "rows", "row_clip"))
    kinds += ((1, "adamw", "none"), (1, "adamw", "exact_cap"), (1, "muon", "exact_cap"))
    groups, rest = [], list(params)
    for count, kind, constraint in kinds:
        groups.append({"params": rest[:count], "kind": kind, "constraint": constraint})
        rest = rest[count:]
    return params, groups


def walk(params, optimizer, steps, seed):
    """Step on gradients that depend on the seed alone; the frozen parameter has none."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params[:-1]:
            p.grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(p.grad, p.device_mesh, [Shard(0)])
        optimizer.step()


def whole(params):
    """Copies of the parameters' values."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def digest(tensors):
    """A hash of the exact values."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def distance(params, end):
    """The largest difference."""
    return max(float((a - b).abs().max()) for a, b in zip(whole(params), end, strict=True))


def check_optimizer(sharded):
    """Five steps, a checkpoint, three steps; again from the checkpoint, here and alone."""
    params, groups = parameters(sharded)
    optimizer = ShardedMuon(groups, lr=0.05)
    walk(params, optimizer, 5, seed=1)
    box = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(box)
    values = whole(params)
    walk(params, optimizer, 3, seed=2)
    end = whole(params)
    found = {"end": digest(end), "stored": len(box[0]["state"])}
    found["held"] = sum("momentum" in s or "exp_avg" in s for s in optimizer.state.values())
    for name, kind in (("resumed", ShardedMuon), ("alone", Muon)):
        params, groups = parameters(sharded and kind is ShardedMuon)
        for p, value in zip(params, values, strict=True):
            is_split = isinstance(p, DTensor)
            p.data.copy_(distribute_tensor(value, p.device_mesh, [Shard(0)]) if is_split else value)
        optimizer = kind(groups, lr=0.05)
        optimizer.load_state_dict(copy.deepcopy(box[0]))
        walk(params, optimizer, 3, seed=2)
        found[name] = digest(whole(params)) if kind is ShardedMuon else distance(params, end)
    params, groups = parameters(sharded=False)
    optimizer = Muon(groups, lr=0.05)
    walk(params, optimizer, 5, seed=1)
    walk(params, optimizer, 3, seed=2)
    return found | {"plain": distance(params, end)}


class Stop(Exception):
    """Ends a run in the middle."""


def run(folder, text, name, *overrides, resumed=False):
    """Train; return the figures, and a hash of the weights that this rank holds in the end."""
    ends = []
    fit_end = LipschitzModule.on_train_end
    LipschitzModule.on_train_end = lambda self: ends.append(digest(whole(self.model.parameters())))
    common = (f"data.path={text}", f"data.cache={folder / 'cache'}", *COMMON)
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", overrides=[*common, *overrides])
    directory = folder / name
    directory.mkdir(exist_ok=True)
    task = Run(
        command="train", directory=directory, config=plain(cfg), config_hash="0", resumed=resumed
    )
    try:
        metrics = train(cfg, task).metrics
    finally:
        LipschitzModule.on_train_end = fit_end
    return {"weights": ends[0], "metrics": metrics}


def check_training(folder, text, name):
    """A whole run, and one that stops after its checkpoint at step 3 and resumes."""
    overrides = (f"trainer.strategy={name.partition('-')[0]}", *RUNS[name])
    found = {"whole": run(folder, text, f"{name}-whole", *overrides)}
    save = Checkpoint.on_step

    def save_and_stop(self, trainer, pl_module):
        save(self, trainer, pl_module)
        if trainer.global_step == 3:
            raise Stop

    Checkpoint.on_step = save_and_stop
    try:
        run(folder, text, f"{name}-half", *overrides)
    except Stop:
        found["stopped"] = True
    finally:
        Checkpoint.on_step = save
    return found | {"resumed": run(folder, text, f"{name}-half", *overrides, resumed=True)}


def main(folder, text):
    """Run every check and write ``rank-R.json``."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {"replicas": check_optimizer(sharded=False), "rows": check_optimizer(sharded=True)}
    found |= {name: check_training(folder, text, name) for name in RUNS}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
