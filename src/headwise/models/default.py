"""The embedded default: the folder of the shipped model, and the text that it is looked at with.

The text is not shipped. Every Python carries tens of megabytes of its own sources and
documentation, and the shipped model was trained on a part of them; the files that it never saw
(`is_held_out`) are its natural input. The training recipe (`recipes/default_model`) takes the
same list and the same rule from here, so that the two cannot drift apart.

Nothing here imports torch: the command line asks for the folder and the text before it needs it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from functools import lru_cache
from pathlib import Path

HELD_OUT_ONE_IN = 12
"""One document in so many is kept from training, chosen by the hash of its name."""

EXCLUDED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",  # tables of characters: bytes without language
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",  # comes in as decoded topics, not as escaped literals
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
"""Folders of the standard library that are no part of the corpus, at any depth."""

EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
"""Names that differ from machine to machine."""

TOPIC_PREFIX = "pydoc_data/topics/"
"""Documentation topics are documents of their own, named by this and the topic."""


def default_model_path() -> Path:
    """The folder of the shipped model, in Hugging Face format.

    Raises FileNotFoundError when the installed package does not carry it.
    """
    path = Path(__file__).resolve().parent.parent / "default_model"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded default model is missing from {path}: reinstall headwise, or name a "
            "model folder or hub name instead"
        )
    return path


def default_text(characters: int) -> tuple[str, str]:
    """Held-out standard-library text of the running Python, and a name that says so.

    The held-out documents are joined in the order of the hash of their name (so that a short
    text is not all from one package), separated by two newlines, and cut to `characters`.
    The same Python release gives the same text; on another one the documents differ, and with
    them the text and its hash.

    Raises ValueError for a length below 1 or above what this Python has to give.
    """
    if characters < 1:
        raise ValueError(f"characters must be at least 1, got {characters}")
    pieces: list[str] = []
    length = 0
    for name in held_out_documents():
        piece = read_document(name).strip() + "\n\n\n"
        pieces.append(piece)
        length += len(piece)
        if length >= characters:
            break
    if length < characters:
        raise ValueError(
            f"the held-out standard library of this Python has {length} characters, "
            f"{characters} were asked for: give a text of your own"
        )
    title = f"Python {platform.python_version()} standard library, held-out files"
    return "".join(pieces)[:characters], title


def corpus_documents() -> tuple[str, ...]:
    """Names of all documents of the corpus, sorted: source files by their path below the
    standard library's folder, documentation topics as `pydoc_data/topics/<topic>`."""
    root = _library()
    names = [TOPIC_PREFIX + topic for topic in _topics()]
    for folder, below, files in os.walk(root):
        # pruned while walking: site-packages may hold a hundred thousand files
        below[:] = [name for name in below if _is_kept(name)]
        place = Path(folder).relative_to(root)
        names += [(place / name).as_posix() for name in files if _is_kept(name, ".py")]
    return tuple(sorted(names))


def held_out_documents() -> tuple[str, ...]:
    """Names of the documents that the shipped model was not trained on, by hash of their name."""
    return tuple(sorted(filter(is_held_out, corpus_documents()), key=_digest))


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept from training: a rule on the name alone, so that
    it is the same on every machine."""
    return int(_digest(name), 16) % HELD_OUT_ONE_IN == 0


def read_document(name: str) -> str:
    """The text of one document; bytes that are not UTF-8 are replaced."""
    if name.startswith(TOPIC_PREFIX):
        return _topics()[name.removeprefix(TOPIC_PREFIX)]
    return (_library() / name).read_text(encoding="utf-8", errors="replace")


def _is_kept(name: str, suffix: str = "") -> bool:
    if name.startswith(EXCLUDED_PREFIXES) or name in EXCLUDED_FOLDERS:
        return False
    return name.endswith(suffix)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some distributions split it off
        return {}
    return dict(topics.topics)
