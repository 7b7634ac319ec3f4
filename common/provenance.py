"""What a model was made from: command, seed, corpus and versions, stored inside its bundle.

Nothing in it names a place on the machine: paths are cut to their last part, hashes say the rest.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from common.corpus import Corpus
from common.ledger import versions

FORMAT_VERSION = 1
_CORPUS_FACTS = (
    "text_sha256",
    "tokens_sha256",
    "tokenizer_sha256",
    "train_tokens",
    "val_tokens",
    "train_bytes",
    "val_bytes",
    "split_rule",
)
# A value that starts like a path: from the root, the home or a neighbouring folder.
_PATH = re.compile(r"^(?:~|\.{0,2}/).*|^[A-Za-z]:\\.*")


def portable(argument: str) -> str:
    """Return a command-line argument with paths cut to their last part.

    ``data.path=~/texts/input.txt`` becomes ``data.path=input.txt``; other values stay.
    """
    key, equals, value = argument.partition("=")
    if not equals:
        key, value = "", argument
    if not _PATH.match(value):
        return argument
    return key + equals + (PurePath(value.replace("\\", "/")).name or ".")


def portable_command(command: str, arguments: Sequence[str]) -> str:
    """Return the command line ``lipllm COMMAND ARGUMENTS`` without machine paths."""
    return " ".join(["lipllm", command, *map(portable, arguments)])


def describe_training(
    *, command: str, seed: int, corpus: Corpus | None = None, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the provenance of a trained model as plain JSON values.

    Args:
        command: The command line, already portable.
        seed: Seed of the run.
        corpus: The text it was trained on; None for models of something else.
        facts: Further JSON values, such as the final metrics.
    """
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "seed": seed,
        "versions": versions(),
    }
    if corpus is not None:
        known = {name: corpus.meta[name] for name in _CORPUS_FACTS if name in corpus.meta}
        found["corpus"] = {"name": PurePath(str(corpus.meta["source"])).name, **known}
    return found | dict(facts or {})
