"""Our tokenizers as fast tokenizers of ``transformers``, which need no code of ours.

All are exact: what reads like a reserved token in a text is text, and nothing is tidied up.
"""

import json
from typing import Any

from common.errors import BundleError
from common.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    byte_level_alphabet,
)
from serve.export.library import require_transformers


def fast_tokenizer(tokenizer: Tokenizer, context: int) -> Any:
    """Return a ``PreTrainedTokenizerFast`` with the same ids.

    Batches are filled on the left, with the token that ends documents or, of bytes, with byte 0;
    both are left out where decoding skips special tokens. Other tokenizers have none to spare.

    Args:
        tokenizer: Of a bundle.
        context: Longest sequence of the model, in tokens.

    Raises:
        BackendError: when ``transformers`` is not installed.
        BundleError: for a tokenizer of another kind.
    """
    transformers = require_transformers()
    reserved = {}
    if isinstance(tokenizer, ByteTokenizer):
        model = _bytes()
        reserved["pad_token"] = byte_level_alphabet()[0]
    elif isinstance(tokenizer, CharTokenizer):
        model = _characters(tokenizer.alphabet)
    elif isinstance(tokenizer, BpeTokenizer):
        model = _from_json(tokenizer.to_json()["tokenizer"])
        if tokenizer.document_end is not None:
            end = model.id_to_token(tokenizer.document_end)
            reserved |= {"eos_token": end, "pad_token": end}
    else:
        raise BundleError(f"tokenizer of kind {tokenizer.kind!r}: expected byte, char or bpe")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=context,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **reserved,
    )


def _bytes() -> Any:
    """Return byte-level BPE without merges: id and byte are one number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = byte_level_alphabet()
    vocabulary = {character: value for value, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters(alphabet: str) -> Any:
    """Return a word tokenizer whose words are single characters; unknown ones are an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: value for value, character in enumerate(alphabet)}
    # The name of the unknown word is not in the vocabulary: it cannot come out.
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _from_json(model: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(model))
