"""Token shards in the challenge's binary format: read with every check, written in a stream.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) and then that many
little-endian uint16 tokens. Checks are here and nowhere else, so that every reader refuses the same
files with the same words.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError

Tokens = NDArray[np.uint16]
Split = Literal["train", "val"]

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_VOCAB_SIZE = 2**16
TOKENS_PER_SHARD = 100_000_000
"""Every shard of the challenge but the last has this many tokens."""
SCAN_TOKENS = 1 << 22
"""Tokens looked at in one go when a whole shard is read, so that memory stays flat."""

GET_AGAIN = "fetch or prepare it again"


def num_tokens(path: Path) -> int:
    """Number of tokens that the header states, after every check that needs no token.

    Raises DataError: no such file, too short for a header, wrong magic, wrong version, no tokens,
    or a file size that disagrees with the header.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such shard; {GET_AGAIN}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise DataError(
            f"{path}: {size} bytes, expected at least the {HEADER_BYTES} bytes of a shard header; "
            f"{GET_AGAIN}"
        )
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    magic, version, count = (int(word) for word in header[:3])
    if magic != MAGIC:
        raise DataError(
            f"{path}: first word is {magic}, expected {MAGIC}: this is not a token shard; "
            f"check the path, or {GET_AGAIN}"
        )
    if version != VERSION:
        raise DataError(
            f"{path}: format version {version}, expected {VERSION}; convert it, or {GET_AGAIN}"
        )
    if count <= 0:
        raise DataError(f"{path}: header states {count} tokens, expected at least 1; {GET_AGAIN}")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: {kind}: {size} bytes, expected {expected} for the {count} tokens in its "
            f"header; {GET_AGAIN}"
        )
    return count


def open_shard(path: Path) -> Tokens:
    """The tokens of a shard as a read-only memory map. Raises DataError as `num_tokens` does."""
    count = num_tokens(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def check_range(path: Path, tokens: Tokens, vocab_size: int) -> None:
    """Raises DataError at the first token that is not below `vocab_size`; reads every token."""
    for start in range(0, len(tokens), SCAN_TOKENS):
        outside = tokens[start : start + SCAN_TOKENS] >= vocab_size
        if outside.any():
            position = start + int(outside.argmax())
            raise DataError(
                f"{path}: token {int(tokens[position])} at position {position}, expected less than "
                f"the vocabulary of {vocab_size}; pair the shard with the tokenizer it was made "
                f"with, or {GET_AGAIN}"
            )


class ShardWriter:
    """Appends tokens to STEM_SPLIT_000000.bin and following, each `tokens_per_shard` long but the
    last. "val_bytes" names the byte side-car of the validation shards, in the same format.

    A shard's header is completed when the shard is, so a file left by a crash has count 0 and is
    refused by `num_tokens`. Use as a context manager; `paths` is complete after it.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        split: Split | Literal["val_bytes"],
        tokens_per_shard: int = TOKENS_PER_SHARD,
    ) -> None:
        self._folder = folder
        self._prefix = f"{stem}_{split}"
        self._tokens_per_shard = tokens_per_shard
        self._count = 0
        self.paths: list[Path] = []
        self.num_tokens = 0

    def append(self, tokens: Tokens) -> None:
        """Write tokens, opening further shards as they fill."""
        while len(tokens):
            if not self.paths or self._count == self._tokens_per_shard:
                self._finish_shard()
                self._start_shard()
            head = tokens[: self._tokens_per_shard - self._count]
            self._file.write(head.astype("<u2", copy=False).tobytes())
            self._count += len(head)
            self.num_tokens += len(head)
            tokens = tokens[len(head) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._finish_shard()

    def _start_shard(self) -> None:
        path = self._folder / f"{self._prefix}_{len(self.paths):06d}.bin"
        self._file = path.open("wb")
        self._file.write(_header(0))
        self._count = 0
        self.paths.append(path)

    def _finish_shard(self) -> None:
        if self.paths and not self._file.closed:
            self._file.seek(0)
            self._file.write(_header(self._count))
            self._file.close()


def _header(count: int) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()
