"""A corpus that every Python installation carries: documentation, docstrings and source code.

It needs no download and no account. What it holds depends on the Python version, so scores on it
compare only between runs on one machine; the manifest states the version.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.build_folder import build_folder, sole_maker
from trainer.data.dataset import Dataset
from trainer.data.encode import LabelledDocument, Progress, describe_dataset, write_dataset
from trainer.data.manifest import read_manifest
from trainer.data.shards import Split
from trainer.data.tokenizer import sample_sentences, train_tokenizer
from trainer.errors import DataError

BUILDER_VERSION = 1
"""Raised whenever the same Python would give another corpus."""
MAX_CHARS = 6_000_000
VAL_FRACTION = 0.04
SAMPLE_SENTENCES = 2000
"""2 MB of text: enough for a few hundred pieces."""
SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "__phello__",
        "lib2to3",
        "distutils",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "lib-dynload",
    }
)
"""Folders that are tests, demonstrations, tables, or not in every version."""


def build_demo(
    out: Path, vocab_size: int = 512, progress: Progress | None = None
) -> dict[str, Any]:
    """Make the data folder `out` from the standard library of this Python.

    Returns at once when `out` holds this corpus already; replaces it when it is broken, half
    written or of another version. Safe to call from several processes: one works, the others wait.

    Returns {dir, vocab_size, train_tokens, val_tokens, digest}. Raises DataError when `out` holds
    other files or cannot be written to.
    """
    source = {
        "kind": "python-standard-library",
        "python": platform.python_version(),
        "builder": BUILDER_VERSION,
    }
    with sole_maker(out):
        if found := _existing(out, vocab_size, source):
            return found
        with build_folder(out) as folder:
            documents = demo_documents(progress)
            model = folder / f"demo_{vocab_size}_bpe.model"
            train_texts = (text for split, text in documents if split == "train")
            train_tokenizer(sample_sentences(train_texts, SAMPLE_SENTENCES), vocab_size, model)
            labelled = _told(documents, progress)
            manifest = write_dataset(folder, labelled, model, vocab_size, source, "demo")
    return describe_dataset(out, manifest)


def demo_documents(progress: Progress | None = None) -> list[LabelledDocument]:
    """The corpus: documentation topics, and for every module its docstrings and its code.

    Modules and topics come in an order that a hash of their names gives, so that every stretch of
    the stream is a like mixture. All documents of a module are in one split.
    """
    topics, files = _topics(), _module_files()
    names = sorted([*topics, *files], key=_hash_of)
    documents: list[LabelledDocument] = []
    num_chars = 0
    for number, name in enumerate(names):
        split: Split = "val" if _hash_of(name) < VAL_FRACTION * 2**64 else "train"
        texts = [topics[name]] if name in topics else _module_texts(files[name])
        documents += [(split, text) for text in texts]
        num_chars += sum(map(len, texts))
        if progress is not None:
            progress("tokenizer", number + 1, len(names))
        if num_chars >= MAX_CHARS:
            break
    return documents


def _existing(out: Path, vocab_size: int, source: dict[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(out)
        if manifest is None or manifest.source != source:
            return None
        Dataset.open(out, vocab_size)
    except DataError:
        return None
    return describe_dataset(out, manifest)


def _told(
    documents: list[LabelledDocument], progress: Progress | None
) -> Iterator[LabelledDocument]:
    for number, document in enumerate(documents):
        if progress is not None:
            progress("encode", number + 1, len(documents))
        yield document


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return {f"topic {name}": text for name, text in topics.items()}


def _module_files() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - SKIPPED
        for name in names:
            path = Path(folder, name)
            files[path.relative_to(root).as_posix()] = path
    return {
        name: path
        for name, path in files.items()
        if name.endswith(".py") and not name.startswith(("config-", "_sysconfigdata"))
    }


def _module_texts(path: Path) -> list[str]:
    """Docstrings as one document and the code without them as another; nothing for a file that is
    not plain Python."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return []
    lines: list[str | None] = list(source.splitlines())
    docstrings = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            docstrings.append(text)
            first = node.body[0]
            for number in range(first.lineno, (first.end_lineno or first.lineno) + 1):
                lines[number - 1] = None
    code = "\n".join(line for line in lines if line is not None)
    return [text for text in ("\n\n".join(docstrings), code) if text.strip()]


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
