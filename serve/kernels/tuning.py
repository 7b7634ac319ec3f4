"""Launch parameters of the Triton kernels, one row per architecture; nothing is guessed elsewhere.

Rows marked "by arithmetic" were chosen without the device: keys and values of all stages fit the
shared memory, scores fit the registers.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Sizes of the work of one program.

    Attributes:
        tile_bytes: Keys (or values) that a program of the attention kernel holds at once.
        tile_slots: Most slots of such a tile.
        score_values: Components of keys that one warp of the score kernel holds.
        stages: Tiles in flight in the attention kernel.
        warps: Warps per program for a head width up to 128; twice as many above.
        split_slots: Slots of one part of a row in the attention kernel; more in the longest rows.
        move_rows: Slots that one program of the compaction moves.
        select_tile: Slots that the selection reads at once.
        write_heads: Heads of a token that one program writes.
        most_splits: Most parts of a row: the combination holds one output of each.
    """

    tile_bytes: int
    tile_slots: int
    score_values: int
    stages: int
    warps: int
    split_slots: int
    move_rows: int
    select_tile: int
    write_heads: int = 8
    most_splits: int = 64

    def tile(self, width: int, itemsize: int) -> int:
        """Return the slots of an attention tile: a power of two from 16 (a matrix product's)."""
        return max(16, min(self.tile_slots, _floor(self.tile_bytes // (width * itemsize))))

    def score_tile(self, width: int) -> int:
        """Return the slots of a program of the score kernel: a power of two from 16."""
        return max(16, _floor(self.score_values * self._warps(width) // width))

    def options(self, width: int = 0, *, stages: bool = False) -> dict[str, int | bool]:
        """Return Triton's launch options for heads of this width.

        Args:
            width: Head width D; 0 where it does not matter.
            stages: Whether the kernel has a loop worth pipelining.
        """
        # Fused multiply-add is asked for by name: newer versions of Triton change its default.
        options: dict[str, int | bool] = {"num_warps": self._warps(width)}
        options["enable_fp_fusion"] = True
        return options | {"num_stages": self.stages} if stages else options

    def _warps(self, width: int) -> int:
        return self.warps if width <= 128 else 2 * self.warps

    def splits(self, slots: int) -> int:
        """Return into how many parts to split rows of at most ``slots`` slots.

        By the table's width, which is known without the device; how a row is split depends on its
        own length alone, so that its result does not depend on the batch.
        """
        return max(1, min(self.most_splits, -(-slots // self.split_slots)))


def _floor(value: int) -> int:
    """Return the largest power of two that is at most ``value``, at least 1."""
    return 1 << max(value, 1).bit_length() - 1


# By arithmetic: compute capability 9.0, 228 KiB of shared memory.
HOPPER = Tuning(
    tile_bytes=16384,
    tile_slots=128,
    score_values=2048,
    stages=3,
    warps=4,
    split_slots=256,
    move_rows=32,
    select_tile=1024,
)
# By arithmetic: 8.0 has 164 KiB, 8.6 and 8.9 have 100 KiB.
AMPERE = Tuning(
    tile_bytes=16384,
    tile_slots=64,
    score_values=2048,
    stages=2,
    warps=4,
    split_slots=256,
    move_rows=32,
    select_tile=1024,
)
# Everything else, the interpreter included.
SAFE = Tuning(
    tile_bytes=8192,
    tile_slots=64,
    score_values=2048,
    stages=1,
    warps=4,
    split_slots=256,
    move_rows=32,
    select_tile=512,
)
_BY_MAJOR = {8: AMPERE, 9: HOPPER}


@cache
def tuning_for(device: torch.device) -> Tuning:
    """Return the row of the device's architecture."""
    if device.type != "cuda":
        return SAFE
    return _BY_MAJOR.get(torch.cuda.get_device_capability(device)[0], SAFE)
