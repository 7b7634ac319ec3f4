"""Fixtures of the kernel tests: paged caches with stale slots, and Triton's interpreter."""

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

PRELUDE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import serve.kernels as kernels
from common.errors import ShapeError
torch.manual_seed(0)

def tables_of(lengths, block_size, spare=0):
    rows, pages = len(lengths), -(-max(lengths) // block_size) + 1
    tables = torch.randperm(rows * pages + spare)[: rows * pages].view(rows, pages).int()
    used = torch.arange(pages) * block_size < torch.tensor(lengths)[:, None]
    return torch.where(used, tables, -1), rows * pages + spare

def gap(got, want):
    assert bool((got.isfinite() == want.isfinite()).all())
    return float((got.double() - want.double())[want.isfinite()].abs().max())
"""


def make_cache(
    lengths: list[int],
    *,
    kv_heads: int = 2,
    width: int = 8,
    block_size: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pools with shuffled pages, and a padded table; what no sequence fills is NaN."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // block_size) for length in lengths]
    blocks = sum(pages) + 3
    order = torch.randperm(blocks, generator=generator)
    tables = torch.full((len(lengths), max(max(pages), 1) + 1), -1, dtype=torch.int32)
    shape = (blocks, kv_heads, block_size)
    k_pool = torch.full((*shape, width), math.nan, dtype=dtype)
    v_pool = k_pool.clone()
    pos_pool = torch.full(shape, -7, dtype=torch.int32)
    start = 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        tables[row, :count] = order[start : start + count].int()
        start += count
        for head in range(kv_heads):
            slot = torch.arange(length)
            at = (tables[row, slot // block_size].long(), head, slot % block_size)
            for pool in (k_pool, v_pool):
                content = torch.randn(length, width, generator=generator, dtype=torch.float64)
                pool[at] = content.to(dtype)
            positions = torch.randperm(length + 5, generator=generator)[:length].sort().values
            pos_pool[at] = positions.int()
    return k_pool, v_pool, pos_pool, tables


def slot_of(pool: torch.Tensor, tables: torch.Tensor, row: int, head: int, slot: int):
    """Read one slot of one head through the block table."""
    block_size = pool.shape[2]
    return pool[int(tables[row, slot // block_size]), head, slot % block_size]


def random_keep(lengths: list[int], kv_heads: int, kept: int, seed: int = 0) -> torch.Tensor:
    """Return a random set of kept slots for each row and head (R, K, kept), ascending."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [torch.randperm(n, generator=generator)[:kept].sort().values for _ in range(kv_heads)]
        for n in lengths
    ]
    return torch.stack([torch.stack(row) for row in rows])


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference; infinite where only one of the two is finite."""
    if not torch.equal(got.isfinite(), want.isfinite()):
        return math.inf
    difference = (got.double() - want.double())[want.isfinite()].abs()
    return float(difference.max()) if difference.numel() else 0.0


@pytest.fixture(scope="session")
def paged() -> SimpleNamespace:
    """Return the helpers of this file by name."""
    return SimpleNamespace(make_cache=make_cache, slot_of=slot_of, random_keep=random_keep, gap=gap)


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], None]:
    """Return a function that runs a program under the interpreter; it must not raise."""

    def run(program: str) -> None:
        script = PRELUDE + textwrap.dedent(program)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=110, cwd=ROOT
        )
        if "only 0-dimensional arrays can be converted" in done.stderr:
            pytest.skip("the interpreter of this version of triton needs an older numpy")
        assert done.returncode == 0, done.stderr[-3000:]

    return run
