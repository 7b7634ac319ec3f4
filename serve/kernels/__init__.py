"""Kernels over the paged KV cache: key scoring, compaction, decode attention.

Each one has a torch reference (``reference.py``) and may have a Triton kernel; ``dispatch.py``
chooses per call. Cache layout, one pool per layer: keys and values (blocks, K, block_size, D),
original positions (blocks, K, block_size) int32; a table row lists the blocks of one sequence.
"""

from serve.kernels.dispatch import BACKENDS as BACKENDS
from serve.kernels.dispatch import compact_kv as compact_kv
from serve.kernels.dispatch import gather_pages as gather_pages
from serve.kernels.dispatch import paged_decode as paged_decode
from serve.kernels.dispatch import score_keys as score_keys
