"""dataset.json: what a folder of shards holds, so that a run need not read every token to know.

A shard is read whole once, for its digest and its largest token. Afterwards its entry is trusted
while the file's size and modification time stand; a file that was touched or copied is read again
and must then have the content that the manifest states. A folder that cannot be written to works
too, and is read whole each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.data.shards import (
    MAX_VOCAB_SIZE,
    SCAN_TOKENS,
    Split,
    check_range,
    num_tokens,
    open_shard,
)
from trainer.errors import DataError

FILE_NAME = "dataset.json"
REMEDY = "prepare or fetch the data again, or delete dataset.json if the change was meant"


class ShardEntry(BaseModel):
    """One shard as it was when it was read whole."""

    model_config = ConfigDict(frozen=True)

    name: str
    split: Split
    num_tokens: int
    max_token: int
    sha256: str
    """Of the whole file."""
    mtime_ns: int


class Manifest(BaseModel):
    """The content of a data folder."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    vocab_size: int
    tokenizer_name: str
    tokenizer_sha256: str
    shards: tuple[ShardEntry, ...]
    """Training shards in name order, then validation shards in name order."""
    val_bytes: tuple[ShardEntry, ...] = ()
    """Byte side-car of the validation shards, where the data has one; max_token is in bytes."""
    source: dict[str, Any] = {}
    """How the data was made; free text for people, and the key of the embedded corpus."""

    @property
    def digest(self) -> str:
        """16 hex digits that name the content: tokenizer, shards and side-car in order, not their
        names."""
        parts = [self.tokenizer_sha256]
        parts += [f"{entry.split} {entry.sha256}" for entry in self.shards]
        parts += [f"val_bytes {entry.sha256}" for entry in self.val_bytes]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def num_tokens(self, split: Split) -> int:
        """Tokens in all shards of a split."""
        return sum(entry.num_tokens for entry in self.shards if entry.split == split)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None when it has none. Raises DataError when it is not one."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise DataError(f"{path}: not a data manifest ({error}); {REMEDY}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place at once, whole. Raises OSError when the folder is read-only."""
    text = json.dumps({**manifest.model_dump(), "digest": manifest.digest}, indent=1) + "\n"
    partial = folder / f".{FILE_NAME}.{os.getpid()}"
    try:
        partial.write_text(text)
        partial.replace(folder / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def current_manifest(
    folder: Path,
    shards: Mapping[Split, Sequence[Path]],
    tokenizer: Path,
    vocab_size: int,
    source: dict[str, Any] | None = None,
    val_bytes: Sequence[Path] = (),
) -> Manifest:
    """The manifest of these files, reading only what the folder's own does not vouch for, and
    brought up to date on disk where the folder allows it.

    Raises DataError for a bad shard, a token outside the vocabulary, or files that are not those
    the folder's manifest describes.
    """
    known = read_manifest(folder)
    entries = {entry.name: entry for entry in _all_entries(known)} if known else {}
    paths = [(split, path) for split in shards for path in shards[split]]
    if known:
        _check_names(folder, known, [path.name for _, path in paths] + [p.name for p in val_bytes])
    manifest = Manifest(
        vocab_size=vocab_size,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=file_sha256(tokenizer),
        shards=tuple(
            _entry(path, split, vocab_size, entries.get(path.name)) for split, path in paths
        ),
        val_bytes=tuple(
            _entry(path, "val", MAX_VOCAB_SIZE, entries.get(path.name)) for path in val_bytes
        ),
        source=(source if source is not None else known.source if known else {}),
    )
    if known and known.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise DataError(
            f"{tokenizer}: is not the tokenizer that the shards were made with; {REMEDY}"
        )
    if manifest != known:
        _write_if_possible(folder, manifest)
    return manifest


def _entry(path: Path, split: Split, vocab_size: int, known: ShardEntry | None) -> ShardEntry:
    count = num_tokens(path)
    mtime_ns = path.stat().st_mtime_ns
    if known and (known.num_tokens, known.mtime_ns) == (count, mtime_ns):
        if known.max_token >= vocab_size:
            check_range(path, open_shard(path), vocab_size)
        return known
    tokens = open_shard(path)
    check_range(path, tokens, vocab_size)
    starts = range(0, count, SCAN_TOKENS)
    entry = ShardEntry(
        name=path.name,
        split=split,
        num_tokens=count,
        max_token=max(int(np.max(tokens[start : start + SCAN_TOKENS])) for start in starts),
        sha256=file_sha256(path),
        mtime_ns=mtime_ns,
    )
    if known and known.sha256 != entry.sha256:
        raise DataError(
            f"{path}: content {entry.sha256[:16]} differs from {known.sha256[:16]} in {FILE_NAME}; "
            f"{REMEDY}"
        )
    return entry


def _all_entries(known: Manifest) -> tuple[ShardEntry, ...]:
    return known.shards + known.val_bytes


def _check_names(folder: Path, known: Manifest, names: list[str]) -> None:
    expected = [entry.name for entry in _all_entries(known)]
    missing = sorted(set(expected) - set(names))
    foreign = sorted(set(names) - set(expected))
    if missing or foreign:
        parts = [f"is missing {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(foreign)}, which it does not list"] if foreign else []
        raise DataError(f"{folder}: {FILE_NAME} and folder disagree: {'; '.join(parts)}; {REMEDY}")


def _write_if_possible(folder: Path, manifest: Manifest) -> None:
    # A shared read-only data folder is normal on a cluster; the manifest only saves time.
    try:
        write_manifest(folder, manifest)
    except OSError:
        return
