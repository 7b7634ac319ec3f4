"""Keys of the prefix cache: one per full block, chained over everything that decides its content.

A key stands for the model (the root), all tokens before the block and those in it. Keys are
cryptographic, so that nobody can construct a prompt that is served another prompt's cache.
"""

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16  # 128 bits of SHA-256


def root_key(*parts: str) -> bytes:
    """Return the key before the first block.

    Args:
        *parts: Everything beside the tokens that changes keys and values: fingerprint of the
            model, dtype, block size, the caller's salt.
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", errors="surrogatepass")
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()[:KEY_BYTES]


def extend_keys(
    keys: list[bytes], root: bytes, tokens: Sequence[int], block_size: int, num_tokens: int
) -> None:
    """Append the keys of the full blocks among the first ``num_tokens`` tokens that lack one.

    Args:
        keys: Keys of the first blocks, extended in place.
        root: What precedes the first block, from ``root_key``.
        tokens: Token ids, at least ``num_tokens``.
        block_size: Tokens per block.
        num_tokens: How many tokens count.
    """
    parent = keys[-1] if keys else root
    for start in range(len(keys) * block_size, num_tokens - block_size + 1, block_size):
        data = array("q", tokens[start : start + block_size]).tobytes()
        parent = hashlib.sha256(parent + data).digest()[:KEY_BYTES]
        keys.append(parent)
