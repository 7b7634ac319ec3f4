"""One class of documents of a corpus and everything else: which text a model is to forget.

A class of a folder is one of its files or subfolders (``json``, ``xml/dom``, ``encodings/*``); of a
single text in the form of a play it is one speaker. Each class is divided as the corpus was when a
model was trained on it: what that model has seen, and what was held out.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from common.corpus_config import CONTINUOUS, DataConfig
from common.documents import documents
from common.errors import DataError
from common.packing import ended, held_documents, hold_out
from common.sources import HUB_CORPORA, Files, Hub, local_files, stdlib_files

SUGGESTED = 5
"""So many existing classes are named when the wanted one does not exist."""
_SPEAKER = re.compile(r"([A-Z][^\n:.!?;,]{0,30}):")
_GAP = b"\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DocumentClasses:
    """Texts of one class and of all others.

    Attributes:
        forget_train: The class, as far as the corpus trains on it.
        forget_held: The class, held out.
        retain_train: Everything else that the corpus trains on.
        retain_held: Everything else that is held out.
        is_unseen: Whether ``forget_held`` is held out from training, not only from the editing.
        rule: How trained and held-out text were told apart, in words.
    """

    forget_train: bytes
    forget_held: bytes
    retain_train: bytes
    retain_held: bytes
    is_unseen: bool
    rule: str


def document_classes(config: DataConfig, name: str) -> DocumentClasses:
    """Divide a corpus by class and by whether a model trained on it has seen the text.

    Documents count as held out as ``prepare_corpus`` holds them out with the same settings: whole
    files by their hashes, the end of a single text by position. A class whose every file was
    trained on still needs a held-out part: then the end of the class (``val_fraction`` of it) is
    only kept from the editing, and ``rule`` says so.

    Args:
        config: The corpus; give the settings that the model was trained with.
        name: A file or folder (with or without ``.py``; dots for slashes; a glob over relative
            names), or a speaker.

    Raises:
        DataError: for a class that does not exist (some that do are named), for a corpus whose
            documents have no names, or when the class is all there is.
        BackendError: when ``datasets`` is needed and missing.
    """
    source = _source(config)
    texts = list(documents(source, config.column, config.max_bytes))
    is_play = isinstance(source, Hub) or len(source.paths) == 1
    if is_play:
        found = _speeches(texts, config, name)
    else:
        assert isinstance(source, Files)
        found = _files(source, texts, config, name)
    for part, text in (("", found.forget_train), ("nothing else ", found.retain_train)):
        if not text:
            raise DataError(
                f"unlearn.forget={name}: {part or 'none of it is '}in the training text; choose a "
                "class that is some of the training text, not none or all of it"
            )
    return found


def _source(config: DataConfig) -> Files | Hub:
    """Return a source whose documents have names or speakers."""
    if config.stream:
        raise DataError("data.stream=true: a stream has no document classes; set it to false")
    if config.source == "stdlib":
        return stdlib_files()
    if config.path is not None:
        found = local_files(Path(config.path).expanduser(), as_bytes=config.source == "bytes")
        if found.loader in ("text", "bytes"):
            return found
    elif config.source == "shakespeare":
        return dataclasses.replace(HUB_CORPORA[config.source], revision=config.revision)
    raise DataError(
        f"data={config.source}: its documents have no names, so there is no class to forget; use "
        "data=stdlib, data=shakespeare, or a folder of text files as data.path"
    )


def _files(source: Files, texts: Sequence[bytes], config: DataConfig, name: str) -> DocumentClasses:
    """Divide whole files; empty ones are no documents."""
    is_text = config.source != "bytes"
    texts = ended(texts) if is_text else texts
    names = [p.relative_to(source.root).as_posix() for p in source.paths if p.stat().st_size]
    # A limit on bytes ends the documents early.
    named = dict(zip(names, texts, strict=False))
    chosen = _matching(named, name)
    share, is_whole = config.val_fraction, config.source not in CONTINUOUS
    train, _, rule = hold_out(texts, share, whole_documents=is_whole, is_text=is_text)
    held = held_documents(texts, share) if is_whole else set()
    parts: dict[tuple[bool, bool], list[bytes]] = {
        (is_chosen, is_held): [] for is_chosen in (True, False) for is_held in (True, False)
    }
    start = 0
    for index, (path, text) in enumerate(named.items()):
        if held:
            seen = 0 if index in held else len(text)
        else:
            seen = min(max(len(train) - start, 0), len(text))
        parts[path in chosen, False].append(text[:seen])
        parts[path in chosen, True].append(text[seen:])
        start += len(text)
    joined = {key: b"".join(pieces) for key, pieces in parts.items()}
    return _classes(joined, rule, config.val_fraction)


def _matching(named: Mapping[str, bytes], name: str) -> set[str]:
    """Return the file names of a class.

    Raises:
        DataError: when there is none, naming close or large ones.
    """
    wanted = name.strip("/")
    if any(sign in wanted for sign in "*?["):
        found = set(fnmatch.filter(named, wanted))
    else:
        folder = wanted if wanted in named else wanted.removesuffix(".py").replace(".", "/")
        found = {path for path in named if _belongs(path, wanted) or _belongs(path, folder)}
    if not found:
        sizes = Counter[str]()
        for path, text in named.items():
            sizes[path.partition("/")[0].removesuffix(".py")] += len(text)
        raise _missing(name, sizes, "file or folder")
    return found


def _belongs(path: str, name: str) -> bool:
    stem = str(PurePosixPath(path).with_suffix(""))
    return path == name or stem == name or path.startswith(f"{name}/")


def _missing(name: str, sizes: Counter[str], kind: str) -> DataError:
    near = difflib.get_close_matches(name, sizes, n=2)
    largest = [other for other, _ in sizes.most_common(SUGGESTED) if other not in near]
    known = ", ".join([*near, *largest][:SUGGESTED]) or "none at all"
    return DataError(f"unlearn.forget={name}: no such {kind} in the corpus; there is {known}")


def _speeches(texts: Sequence[bytes], config: DataConfig, name: str) -> DocumentClasses:
    """Divide a play by speaker, and by what lies before and behind the end of training text."""
    train, held, rule = hold_out(texts, config.val_fraction, whole_documents=False)
    sizes, start = Counter[str](), 0
    parts: dict[tuple[bool, bool], list[bytes]] = {
        (is_chosen, is_held): [] for is_chosen in (True, False) for is_held in (True, False)
    }
    for block in (train + held).split(_GAP):
        head = _SPEAKER.match(block.decode("utf-8", errors="replace"))
        if head is not None:
            sizes[head[1]] += len(block)
        is_chosen = head is not None and head[1] == name
        seen = min(max(len(train) - start, 0), len(block))
        parts[is_chosen, False].append(block[:seen])
        parts[is_chosen, True].append(block[seen:])
        start += len(block) + len(_GAP)
    if name not in sizes:
        raise _missing(name, sizes, "speaker")
    joined = {key: _GAP.join(filter(None, pieces)) for key, pieces in parts.items()}
    return _classes(joined, rule, config.val_fraction)


def _classes(
    parts: dict[tuple[bool, bool], bytes], rule: str, val_fraction: float
) -> DocumentClasses:
    """Return the parts, by (of the class, held out); a class that was all trained on is cut."""
    is_unseen = bool(parts[True, True])
    if not is_unseen:
        rule += "; none of the class, so its end serves as held out although it was trained on"
        parts[True, False], parts[True, True], _ = hold_out(
            [parts[True, False]], val_fraction, whole_documents=False
        )
    return DocumentClasses(
        forget_train=parts[True, False],
        forget_held=parts[True, True],
        retain_train=parts[False, False],
        retain_held=parts[False, True],
        is_unseen=is_unseen,
        rule=rule,
    )
