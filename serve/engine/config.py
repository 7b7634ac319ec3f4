"""Size and behaviour of the engine."""

from dataclasses import dataclass
from typing import Literal

from common.config import check_types, one_of, positive
from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Size and behaviour of the engine.

    Attributes:
        block_size: Cache slots per block, a power of two up to 256.
        num_blocks: Blocks in the pool; None fits ``max_num_seqs`` contexts within ``cache_bytes``.
        cache_bytes: Upper limit of an automatically sized pool, in bytes.
        max_num_seqs: Requests that run at the same time.
        max_num_batched_tokens: Tokens per step: decodes first, the rest prefill chunks.
        prefix_caching: Reuse the cache of earlier requests whose prompt begins with the same
            tokens.
        deterministic: Make tokens bit for bit independent of other requests in every dtype: each
            request runs its own matrix products on fixed chunks, with all memory reserved. Slower.
        dtype: Weights and cache: "float32", "float64" or "bfloat16"; None keeps the model's.
        backend: Kernels: "auto" (Triton on CUDA where there is one) or "torch".
        enforce_eager: Never record decode steps as CUDA graphs: a quicker start, slower steps.
        certificate: Bound the logits deviation of every token when the model has a certificate.
        debug: Check the block accounting after every step.

    Raises:
        ConfigError: for an impossible value.
    """

    block_size: int = 16
    num_blocks: int | None = None
    cache_bytes: int = 2**30
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True
    deterministic: bool = False
    dtype: Literal["float32", "float64", "bfloat16"] | None = None
    backend: str = "auto"
    enforce_eager: bool = False
    certificate: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "cache_bytes", "max_num_seqs", "max_num_batched_tokens"):
            positive(f"engine.{name}", getattr(self, name))
        if self.num_blocks is not None:
            positive("engine.num_blocks", self.num_blocks)
        if self.block_size & (self.block_size - 1) or self.block_size > 256:
            raise ConfigError(
                f"engine.block_size={self.block_size}: expected a power of two up to 256; round it"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: expected at least "
                f"max_num_seqs={self.max_num_seqs}, one token for each request; raise it"
            )
        # "triton" alone is for single kernels: prompt chunks attend through torch in any case.
        one_of("engine.backend", self.backend, ("auto", "torch"))
