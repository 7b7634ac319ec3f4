"""From documents to the files of a prepared corpus: what is held out, and the token memory map."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import files
from common.tokenizer import Tokenizer, tokenizer_sha256

FORMAT_VERSION = 1


def hold_out(
    texts: Sequence[bytes], share: float, *, whole_documents: bool, is_text: bool = True
) -> tuple[bytes, bytes, str]:
    """Divide documents into training and validation text.

    Whole documents are held out, in the order of their hashes and as many as fit into the share;
    where fewer than half of it can be reached that way, the end of the text is held out instead.

    Args:
        texts: Documents; joined in order, each ended by a newline if they are several texts.
        share: Of all bytes, to hold out.
        whole_documents: Whether the documents are independent of one another.
        is_text: Whether to join with newlines and to cut between UTF-8 characters.

    Returns:
        Training bytes, validation bytes, and the rule in words.
    """
    if is_text:
        texts = ended(texts)
    if whole_documents and (held := held_documents(texts, share)):
        train = b"".join(text for index, text in enumerate(texts) if index not in held)
        val = b"".join(text for index, text in enumerate(texts) if index in held)
        return train, val, f"{len(held)} of {len(texts)} documents held out"
    whole = b"".join(texts)
    cut = len(whole) - max(1, round(share * len(whole)))
    # Not inside a UTF-8 character: its continuation bytes start with the bits 10.
    while is_text and cut > 0 and whole[cut] & 0xC0 == 0x80:
        cut -= 1
    return whole[:cut], whole[cut:], f"the last {100 * share:g} % of the text held out"


def ended(texts: Sequence[bytes]) -> Sequence[bytes]:
    """Return documents as they are joined: each ends with a newline if they are several."""
    if len(texts) == 1:
        return texts
    return [text if text.endswith(b"\n") else text + b"\n" for text in texts]


def held_documents(texts: Sequence[bytes], share: float) -> set[int]:
    """Return which documents are held out whole, in the order of their hashes.

    Args:
        texts: Documents as they are joined.
        share: Of all bytes, to hold out at most.

    Returns:
        Positions; none where fewer than half of the share can be reached that way.
    """
    wanted, held, used = share * sum(map(len, texts)), set[int](), 0
    for index in sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i]).digest()):
        if used + len(texts[index]) <= wanted:
            held.add(index)
            used += len(texts[index])
    return held if used >= wanted / 2 else set()


def entropy_bits(data: bytes) -> float:
    """Return the entropy of single bytes in bits: what a model of byte frequencies needs."""
    return count_entropy_bits(np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256))


def count_entropy_bits(counts: np.ndarray) -> float:
    """Return the entropy in bits of a distribution given by counts (256,)."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def token_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned integer type that holds every id."""
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_corpus(
    directory: Path, tokenizer: Tokenizer, parts: tuple[bytes, bytes], rule: str
) -> None:
    """Write ``tokens.bin``, ``tokenizer.json`` and ``meta.json`` as one step.

    Args:
        directory: Final place; left alone if another process finished it meanwhile.
        tokenizer: Encodes both parts.
        parts: Training and validation bytes.
        rule: How they were divided, in words.

    Raises:
        DataError: when a part cannot be encoded.
        OSError: when the directory cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    train_ids, val_ids = (tokenizer.encode(part).astype(dtype) for part in parts)
    packed = train_ids.tobytes() + val_ids.tobytes()
    meta = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype,
        "train_tokens": len(train_ids),
        "val_tokens": len(val_ids),
        "train_bytes": len(parts[0]),
        "val_bytes": len(parts[1]),
        "split_rule": rule,
        "unigram_entropy_bits": entropy_bits(parts[1]),
        "text_sha256": hashlib.sha256(parts[0] + parts[1]).hexdigest(),
        "tokens_sha256": hashlib.sha256(packed).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    with files.staged_directory(directory) as stage:
        files.write_bytes(stage / "tokens.bin", packed)
        files.write_bytes(stage / "tokenizer.json", files.to_json(tokenizer.to_json()).encode())
        files.write_bytes(stage / "meta.json", files.to_json(meta).encode())
        files.sync_directory(stage)
        # Another process may have finished the same corpus first: theirs is as good.
        try:
            stage.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
