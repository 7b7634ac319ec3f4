"""Every Triton kernel compiles for Ampere and Hopper, without a GPU, as its wrapper launches it.

What the interpreter cannot see: types that do not unify, tiles that exceed the shared memory,
attention that is not pipelined.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from serve.kernels import compact, decode, rope, score, select  # noqa: E402
from serve.kernels.tuning import AMPERE, HOPPER  # noqa: E402

MODULES = (score, select, compact, decode, rope)
TUNING = {80: AMPERE, 90: HOPPER}
SHARED = 99 * 1024  # bytes a program may hold on the smallest device of the two generations
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
WIDTH, KV_HEADS, GROUP, BLOCK_SIZE = 128, 2, 4, 16


class Recorder:
    """Stands for a kernel: keeps how it is launched instead of launching it."""

    def __init__(self, kernel: Any, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def build(kernel: Any, args: tuple, kwargs: dict, capability: int) -> Any:
    """Compile a recorded launch with the specialisations that Triton would choose."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in names}
    options = {name: value for name, value in kwargs.items() if name not in names}
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned = isinstance(value, torch.Tensor) or (
            not parameter.is_constexpr and value % 16 == 0
        )
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if aligned and (index,) not in constants and not isinstance(value, float):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def launch(name: str, dtype: torch.dtype) -> None:
    """Call a wrapper with tensors of a usual shape."""
    rows, pages, kept = 2, 32, 384
    shape = (rows * pages, KV_HEADS, BLOCK_SIZE)
    keys, pos = torch.zeros(*shape, WIDTH, dtype=dtype), torch.zeros(shape, dtype=torch.int32)
    tables = torch.arange(rows * pages).view(rows, pages)
    lengths, where = torch.full((rows, 1), 500), torch.full((rows,), 600)
    heads, half = KV_HEADS * GROUP, WIDTH // 2
    q, turn = torch.zeros(rows, heads, WIDTH, dtype=dtype), torch.zeros(rows, half)
    new = torch.zeros(rows, KV_HEADS, WIDTH, dtype=dtype)
    if name == "score":
        u, e = torch.zeros(rows, heads, WIDTH), torch.zeros(rows, heads, half)
        score.score_keys(keys, tables, lengths, u, e, half, False)
    elif name == "select":
        scores = torch.zeros(rows, KV_HEADS, 2176)
        select.select_slots(scores, scores.long(), 2048)
    elif name == "compact":
        keep = torch.arange(kept).expand(rows, KV_HEADS, kept)
        compact.compact_kv([keys, keys, pos], tables, keep, tables)
    elif name == "decode":
        bias = torch.zeros(heads, 1024)
        decode.paged_decode(q, keys, keys, pos, tables, lengths, where, 0.1, bias, 400)
    else:
        rope.rope_write(q, new, new, turn, turn, keys, keys, pos, where, lengths[:, 0], False)


CASES = [
    ("score", torch.bfloat16, 90),
    ("select", torch.float32, 90),
    ("compact", torch.bfloat16, 90),
    ("decode", torch.bfloat16, 80),
    ("decode", torch.bfloat16, 90),
    ("decode", torch.float32, 90),
    ("rope", torch.bfloat16, 90),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "capability"), CASES, ids=[f"{c[0]}-{TYPES[c[1]]}-{c[2]}" for c in CASES]
)
def test_kernel_compiles(monkeypatch, tmp_path, name, dtype, capability):
    """Oracle: the compiler, down to machine code; the tables' promise about shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list = []
    for module in MODULES:
        monkeypatch.setattr(module, "tuning_for", lambda device: TUNING[capability])
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Recorder(getattr(module, kernel), launches))
    launch(name, dtype)
    assert launches
    for kernel, args, kwargs in launches:
        built = build(kernel, args, kwargs, capability)
        assert built.asm["cubin"]
        assert built.metadata.shared <= SHARED
        if kernel.__name__ == "_decode_kernel":
            assert "mma.sync" in built.asm["ptx"], "products run on the tensor cores"
            assert "cp.async" in built.asm["ptx"], "pages are fetched ahead"
