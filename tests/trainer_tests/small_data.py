"""A small tokenizer and small data folders for the tests of trainer.data and trainer.evaluate."""

from __future__ import annotations

import argparse
import inspect
import optparse
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from trainer.data.shards import ShardWriter
from trainer.data.tokenizer import sample_sentences, train_tokenizer

VOCAB_SIZE = 400
UNICODE_TEXT = "Caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u2014 \u00fcber \U0001f600 \u043c\u0438. "


@cache
def tokenizer_bytes() -> bytes:
    """A SentencePiece model of VOCAB_SIZE pieces, trained on source code and a little Unicode."""
    text = UNICODE_TEXT * 20 + inspect.getsource(argparse)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.model"
        train_tokenizer(sample_sentences([text]), VOCAB_SIZE, path)
        return path.read_bytes()


def write_tokenizer(folder: Path) -> Path:
    """Put the small tokenizer into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.model"
    path.write_bytes(tokenizer_bytes())
    return path


def write_other_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer trained on another text."""
    train_tokenizer(sample_sentences([inspect.getsource(optparse)]), vocab_size, path)


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of the small vocabulary, BOS at the start and now and then."""
    tokens = np.random.default_rng(seed).integers(4, VOCAB_SIZE, count).astype(np.uint16)
    tokens[::97] = 1
    return tokens


def write_folder(
    folder: Path,
    train: np.ndarray,
    val: np.ndarray,
    tokens_per_shard: int = 1000,
) -> Path:
    """A data folder with these tokens and the small tokenizer."""
    write_tokenizer(folder)
    with ShardWriter(folder, "small", "train", tokens_per_shard) as writer:
        writer.append(train)
    with ShardWriter(folder, "small", "val", tokens_per_shard) as writer:
        writer.append(val)
    return folder
