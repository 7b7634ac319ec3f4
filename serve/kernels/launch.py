"""What the Triton kernels' wrappers share: the interpreter, contiguity, bounds of CPU tables.

Values are checked only on CPU tensors (the interpreter): on a GPU that would wait for the device.
"""

# Legend: R rows, N table width (blocks), K key/value heads.

import torch
import triton
from torch import Tensor

from common.errors import ShapeError

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, which gets arithmetic and dots in bf16 wrong."""


def check_storage(reference: Tensor, **tensors: Tensor) -> None:
    """Refuse pools that the kernels cannot address.

    Raises:
        ShapeError: if a tensor is not contiguous or not on the device of ``reference``.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device != reference.device:
            raise ShapeError(
                f"{name}: expected a contiguous tensor on {reference.device}, got strides"
                f" {tensor.stride()} on {tensor.device}; call contiguous() and to()"
            )


def check_tables(pool: Tensor, tables_RN: Tensor, lengths_RK: Tensor) -> None:
    """Refuse lengths past the table and used entries outside the pool, on the CPU only.

    Raises:
        ShapeError: naming what is out of range.
    """
    if pool.is_cuda:
        return
    blocks, _, block_size = pool.shape[:3]
    longest_R = lengths_RK.amax(1)
    is_used = torch.arange(tables_RN.shape[1]) * block_size < longest_R[:, None]
    pages = tables_RN[is_used]
    room = tables_RN.shape[1] * block_size
    if bool((longest_R > room).any()) or bool(((pages < 0) | (pages >= blocks)).any()):
        raise ShapeError(
            f"tables: a used entry lies outside 0..{blocks - 1} or a length exceeds {room} slots;"
            " fix the block table"
        )
