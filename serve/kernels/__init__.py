"""Kernels over the paged KV cache: write, attend, score, select, compact.

Each one has a torch reference (``reference*.py``) and a Triton kernel in its own file;
``dispatch.py`` states the contracts and chooses per call. Cache layout, one pool per layer or
several layers in one: keys and values (blocks, K, block_size, D), original positions
(blocks, K, block_size) int32; a table row lists the blocks of one sequence.
"""

from serve.kernels.backend import BACKENDS as BACKENDS
from serve.kernels.dispatch import compact_kv as compact_kv
from serve.kernels.dispatch import gather_pages as gather_pages
from serve.kernels.dispatch import paged_decode as paged_decode
from serve.kernels.dispatch import rope_write as rope_write
from serve.kernels.dispatch import score_keys as score_keys
from serve.kernels.dispatch import select_slots as select_slots
