"""A folder of shards and its tokenizer, opened with every check that precedes training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.byte_side_car import check_aligned, check_side_car
from trainer.data.case_marks import case_mark_ids
from trainer.data.manifest import current_manifest
from trainer.data.shards import Split, Tokens, open_shard
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import DataError

SHARD_NAME = re.compile(r"_(train|val|val_bytes)_\d+\.bin$")
"""Digits right after the split: `fineweb_val_bytes_000000.bin` is a byte side-car and no shard,
though a pattern such as `fineweb_val_*` takes it for one."""
VARIANT_NAME = re.compile(r"_sp(\d+)(?!\d)")
"""Published folders name their vocabulary, as in fineweb10B_sp1024."""


@dataclass(frozen=True)
class Dataset:
    """Training and validation shards that belong to one tokenizer."""

    dir: Path
    vocab_size: int
    """Pieces of the tokenizer."""
    tokenizer_path: Path
    train_shards: list[Path]
    """In name order, which is the order of training."""
    val_shards: list[Path]
    train_tokens: int
    val_tokens: int
    digest: str
    """16 hex digits of the content: equal digests, equal data."""
    val_byte_shards: tuple[Path, ...] = ()
    """Byte side-car, one file for each of val_shards; only data of a CaseOps tokenizer has one."""

    @classmethod
    def open(cls, dir: str | Path, vocab_size: int | None = None) -> Dataset:
        """Find, pair and check the files of a folder. Runs on every rank, once per run.

        Args:
            dir: folder with *_train_N.bin and *_val_N.bin; the .model lies beside them or in
                ../../tokenizers, as the challenge lays them out.
            vocab_size: the model's, which must equal the tokenizer's; None = whatever it is.

        Raises DataError that names the file, what was found, what was expected and what to do.
        """
        folder = Path(dir)
        shards, val_byte_shards = _find_shards(folder)
        tokenizer_path = _find_tokenizer(folder, vocab_size)
        tokenizer = load_tokenizer(tokenizer_path)
        num_pieces = tokenizer.vocab_size()
        if vocab_size is not None and vocab_size != num_pieces:
            raise DataError(
                f"the recipe's model.vocab_size = {vocab_size}, but the data in {folder} has "
                f"{num_pieces} pieces ({tokenizer_path.name}); add "
                f"--set model.vocab_size={num_pieces}, or give data of {vocab_size} pieces"
            )
        if case_mark_ids(tokenizer):
            check_side_car(folder, shards["val"], val_byte_shards)
        else:
            val_byte_shards = []  # the tokenizer's table counts
        manifest = current_manifest(
            folder, shards, tokenizer_path, num_pieces, val_bytes=val_byte_shards
        )
        return cls(
            dir=folder,
            vocab_size=num_pieces,
            tokenizer_path=tokenizer_path,
            train_shards=shards["train"],
            val_shards=shards["val"],
            train_tokens=manifest.num_tokens("train"),
            val_tokens=manifest.num_tokens("val"),
            digest=manifest.digest,
            val_byte_shards=tuple(val_byte_shards),
        )

    def read_val(self) -> Tokens:
        """All validation tokens in name order, in memory."""
        return np.concatenate([open_shard(path) for path in self.val_shards])

    def read_val_bytes(self) -> Tokens | None:
        """Bytes of original text of every validation token, from the side-car; None without one.
        Raises DataError when it does not belong to the tokens."""
        if not self.val_byte_shards:
            return None
        num_bytes = np.concatenate([open_shard(path) for path in self.val_byte_shards])
        check_aligned(self.dir, self.read_val(), num_bytes)
        return num_bytes

    def num_scored_tokens(self, seq_len: int) -> int:
        """Validation tokens that evaluation in rows of `seq_len` scores: whole rows only, and the
        first token is nobody's target."""
        return (self.val_tokens - 1) // seq_len * seq_len

    def check_scored_tokens(self, seq_len: int, expected: int) -> None:
        """Raises DataError unless evaluation will score exactly `expected` tokens (0 = any number)
        and at least one row. For data.val_tokens, before training."""
        found = self.num_scored_tokens(seq_len)
        if found == 0:
            raise DataError(
                f"{self.dir}: {self.val_tokens} validation tokens are not one row of "
                f"evaluate.seq_len = {seq_len}; lower it or give more validation text"
            )
        if expected and found != expected:
            raise DataError(
                f"{self.dir}: evaluation at evaluate.seq_len = {seq_len} would score {found} "
                f"tokens, but data.val_tokens = {expected}; the validation set is truncated or "
                "another one: fetch it again, or correct data.val_tokens (0 = any)"
            )


def _find_shards(folder: Path) -> tuple[dict[Split, list[Path]], list[Path]]:
    """Shards by split, and the files of the byte side-car."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such data folder; make one with `caddie data demo --out {folder}` or "
            "`caddie data prepare`, or correct --data"
        )
    found: dict[str, list[Path]] = {"train": [], "val": [], "val_bytes": []}
    for path in sorted(folder.iterdir()):
        if match := SHARD_NAME.search(path.name):
            found[match[1]].append(path)
    shards: dict[Split, list[Path]] = {"train": found["train"], "val": found["val"]}
    for split, paths in shards.items():
        if not paths:
            raise DataError(
                f"{folder}: has no shard named *_{split}_000000.bin; give a folder made by "
                "`caddie data demo`, `prepare` or `fetch`"
            )
    return shards, found["val_bytes"]


def _find_tokenizer(folder: Path, vocab_size: int | None) -> Path:
    beside = sorted(folder.glob("*.model"))
    if len(beside) == 1:
        return beside[0]
    shared = sorted((folder.resolve().parent.parent / "tokenizers").glob("*.model"))
    variant = VARIANT_NAME.search(folder.name)
    wanted = int(variant[1]) if variant else vocab_size
    candidates = beside or shared
    fitting = [path for path in candidates if _fits(path, wanted)]
    if len(fitting) == 1:
        return fitting[0]
    raise DataError(
        f"{folder}: expected one SentencePiece .model beside the shards or in ../../tokenizers"
        + (f" with {wanted} pieces" if wanted else "")
        + f", found {_listed(fitting or candidates)}; put the right one beside the shards"
    )


def _fits(path: Path, wanted: int | None) -> bool:
    return wanted is None or load_tokenizer(path).vocab_size() == wanted


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"
