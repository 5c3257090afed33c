"""Token files of the slowrun tracks, read and written beside the golf shards.

One file holds one split: a dict that torch.save wrote and torch.load(weights_only=True) reads,
which executes nothing:

    tokens uint16 [n]  doc_starts int64 [documents]  bos_id int  seq_shuffle_seed int  seq_size int

Every document begins with bos_id and doc_starts says where; the first is at 0. seq_size is a row
with its last target, 2049. Files from before slowrun PR #76 hold rows in an order instead of
documents: {chunks, valid_counts, batch_size, sequence_size}, where a chunk is batch_size rows and
the last one is filled up with zeros. Not part of a run: it reads shards, which `to_shards` makes.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.documents import BOS_ID, document_starts
from trainer.data.shards import ShardWriter, Split, Tokens, open_shard
from trainer.errors import DataError

SEQ_SIZE = 2049
SHUFFLE_SEEDS: dict[Split, int] = {"val": 42, "train": 43}
MALFORMED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What torch.load raises at files that are something else."""
GPT2_BOS = 50_256
"""End-of-text, which the track's tokenizer puts before every document."""


@dataclass(frozen=True)
class SlowrunTokens:
    """One split."""

    tokens: Tokens
    doc_starts: NDArray[np.int64]
    bos_id: int
    seq_shuffle_seed: int
    """Of the published order of validation rows."""
    seq_size: int = SEQ_SIZE

    @property
    def num_rows(self) -> int:
        """Whole rows, side by side."""
        return len(self.tokens) // self.seq_size

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        starts, faults = self.doc_starts, []
        if self.tokens.dtype != np.uint16 or self.tokens.ndim != 1 or not len(self.tokens):
            faults.append(
                f"tokens are {self.tokens.dtype} {self.tokens.shape}, expected uint16 [n]"
            )
        if starts.dtype != np.int64 or not len(starts) or starts[0] != 0:
            return [*faults, "doc_starts must be int64 and begin with 0"]
        if (np.diff(starts) <= 0).any() or starts[-1] >= len(self.tokens):
            return [*faults, "doc_starts do not rise within the tokens"]
        if (self.tokens[starts] != self.bos_id).any():
            faults.append(f"not every document begins with bos_id = {self.bos_id}")
        if self.seq_size < 2:
            faults.append(f"seq_size = {self.seq_size} has no target")
        return faults


def write(path: Path, split: SlowrunTokens) -> str:
    """Write the file whole or not at all; returns its SHA-256. Raises DataError."""
    _check(path, split)
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(
            {
                "tokens": torch.from_numpy(np.array(split.tokens, np.uint16)),
                "doc_starts": torch.from_numpy(np.array(split.doc_starts, np.int64)),
                "bos_id": split.bos_id,
                "seq_shuffle_seed": split.seq_shuffle_seed,
                "seq_size": split.seq_size,
            },
            partial,
        )
        partial.replace(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room") from None


def read(path: Path) -> SlowrunTokens:
    """The split in a file of the present format. Raises DataError."""
    stored = _load(path, ("tokens", "doc_starts", "bos_id", "seq_shuffle_seed", "seq_size"))
    try:
        split = SlowrunTokens(
            stored["tokens"].numpy(),
            stored["doc_starts"].numpy(),
            int(stored["bos_id"]),
            int(stored["seq_shuffle_seed"]),
            int(stored["seq_size"]),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not the slowrun's types ({error}); prepare it again") from None
    _check(path, split)
    return split


def read_rows(path: Path) -> Tokens:
    """[rows, sequence_size] of a file from before PR #76, in the order in which they lie there.
    Raises DataError."""
    stored = _load(path, ("chunks", "valid_counts", "batch_size", "sequence_size"))
    size = int(stored["sequence_size"])
    rows = []
    for chunk, count in zip(stored["chunks"], stored["valid_counts"], strict=False):
        if chunk.numel() != int(stored["batch_size"]) * size or not 0 <= count * size <= len(chunk):
            raise DataError(f"{path}: a chunk has {chunk.numel()} tokens; prepare it again")
        rows.append(chunk.numpy().astype(np.uint16).reshape(-1, size)[:count])
    if len(stored["chunks"]) != len(stored["valid_counts"]) or not rows:
        raise DataError(f"{path}: chunks and valid_counts differ; prepare it again")
    return np.concatenate(rows)


def from_shards(shards: list[Path], split: Split, bos_id: int = BOS_ID) -> SlowrunTokens:
    """The text of shards, whose first token must begin a document. Raises DataError."""
    tokens = np.concatenate([open_shard(path) for path in shards])
    starts = document_starts(tokens, bos_id)
    made = SlowrunTokens(tokens, starts, bos_id, SHUFFLE_SEEDS[split])
    _check(shards[0], made)
    return made


def to_shards(
    read_from: SlowrunTokens, folder: Path, stem: str, split: Literal["train", "val"]
) -> list[Path]:
    """Write STEM_SPLIT_000000.bin and following; returns them. Documents must begin as those of
    shards do, which the loaders look for; a tokenizer with another BOS is refused.

    Raises: DataError.
    """
    if read_from.bos_id != BOS_ID:
        raise DataError(
            f"documents begin with token {read_from.bos_id}, those of shards with {BOS_ID}; "
            "prepare the text with a tokenizer that puts BOS there"
        )
    with ShardWriter(folder, stem, split) as writer:
        writer.append(read_from.tokens)
    return writer.paths


def _check(path: Path, split: SlowrunTokens) -> None:
    faults = split.faults()
    if faults:
        raise DataError(f"{path}: {'; '.join(faults)}; prepare it again")


def _load(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except MALFORMED as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(f"{path}: no token file ({first}); prepare it again") from None
    missing = [key for key in keys if not isinstance(stored, dict) or key not in stored]
    if missing:
        raise DataError(f"{path}: has no {', '.join(missing)}; prepare it again")
    result: dict[str, Any] = stored
    return result
