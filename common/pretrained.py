"""Published byte-level BPE tokenizers, such as GPT-2's, from a local file or the hub.

Only their vocabulary and merges are used: reserved strings that occur in a text are text, and every
id decodes to the bytes it stands for.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import BackendError, DataError
from common.hub import require_host
from common.tokenizer import BpeTokenizer, byte_level_alphabet

GPT2 = "openai-community/gpt2"
"""The hub's GPT-2: 50,257 ids."""

_FILE = "tokenizer.json"
_REMEDY = "give a local copy with data.tokenizer_path=FILE (tokenizer.json of a byte-level BPE)"
# Everything that commonly breaks exactness: case, spaces at either end, line ends, other scripts.
_PROBE = " Ab  c\t\r\n\n<|endoftext|> e\u0301 \u00e9 \u6f22\u5b57 \U0001f600 \u2028'll 1234\x00 "


def load_tokenizer(place: str) -> BpeTokenizer:
    """Return the tokenizer at ``place``.

    Args:
        place: ``tokenizer.json``, a folder that holds it (or ``vocab.json`` and ``merges.txt``),
            or ``OWNER/NAME`` on the hub.

    Raises:
        DataError: for a missing or foreign file, or an unreachable hub.
        BackendError: when a package is needed and not installed.
    """
    path = Path(place).expanduser()
    if path.is_dir() and not (path / _FILE).is_file() and (path / "vocab.json").is_file():
        model = _from_merges(path)
    elif path.exists():
        model = _read(path / _FILE if path.is_dir() else path)
    elif place.count("/") == 1 and not place.startswith((".", "~", "/")):
        model = _read(_download(place))
    else:
        raise DataError(f"data.tokenizer_path={place}: no such file; {_REMEDY}")
    try:
        tokenizer = BpeTokenizer(_plain(model))
    except DataError as error:
        raise DataError(f"tokenizer {place}: {error}; {_REMEDY}") from None
    _require_exact(tokenizer, place)
    return tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(model.get("tokenizer"), dict):
            model = model["tokenizer"]  # a bundle's own tokenizer.json
        kind = model["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "not the JSON of a tokenizer"
        raise DataError(f"{path}: {reason}; {_REMEDY}") from None
    if kind != "BPE":
        raise DataError(f"{path}: a {kind} tokenizer, not BPE; {_REMEDY}")
    return dict(model)


def _from_merges(path: Path) -> dict[str, Any]:
    """Return the model of GPT-2's original two files."""
    try:
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: vocab.json or merges.txt cannot be read ({error})") from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def _plain(model: dict[str, Any]) -> dict[str, Any]:
    """Return the model without reserved strings; their ids stay, as ordinary entries."""
    vocabulary = dict(model["model"]["vocab"])
    alphabet = byte_level_alphabet()
    for token in model.get("added_tokens") or ():
        if token["id"] not in vocabulary.values():
            vocabulary["".join(alphabet[b] for b in token["content"].encode())] = token["id"]
    inner = {**model["model"], "vocab": vocabulary}
    cleared: dict[str, Any] = {
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return {"version": "1.0", "normalizer": None, **model, **cleared, "model": inner}


def _require_exact(tokenizer: BpeTokenizer, place: str) -> None:
    try:
        found = tokenizer.decode(tokenizer.encode(_PROBE))
    except (BackendError, DataError):
        raise
    except Exception as error:  # tokenizers raises plain Exception for a foreign model
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer {place}: cannot be used ({reason}); {_REMEDY}") from None
    if found != _PROBE:
        raise DataError(
            f"tokenizer {place}: does not give back the text it was given (it normalises or drops "
            f"characters), expected a byte-level one; {_REMEDY}"
        )


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise BackendError(
            f"tokenizer {name}: the hub needs huggingface_hub: pip install 'lipllm[hf]', or "
            f"{_REMEDY}"
        ) from None
    try:
        return Path(huggingface_hub.hf_hub_download(name, _FILE, local_files_only=True))
    except (OSError, ValueError):
        pass  # not in the hub's cache on this machine
    try:
        require_host(constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
        return Path(huggingface_hub.hf_hub_download(name, _FILE))
    except Exception as error:  # the library raises classes of its own, of several packages
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"tokenizer {name}: cannot be fetched ({reason}); {_REMEDY}") from None
