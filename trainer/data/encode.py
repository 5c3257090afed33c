"""Labelled documents to shards: the common end of every way to make a data folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from trainer.data.byte_side_car import original_bytes_counter
from trainer.data.case_marks import case_mark_ids, encode_case
from trainer.data.documents import BOS_ID
from trainer.data.manifest import FILE_NAME, Manifest, current_manifest
from trainer.data.shards import MAX_VOCAB_SIZE, ShardWriter, Split, Tokens
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), total 0 when it is not known; stages "tokenizer", "encode",
"download"."""
LabelledDocument = tuple[Split, str]

BATCH_CHARS = 4_000_000
"""Text encoded in one call."""
SEGMENT_CHARS = 1_000_000
"""Longer documents are encoded in segments: encoding takes about 70 bytes of memory per byte."""


def describe_dataset(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What the data commands print."""
    return {
        "dir": str(folder),
        "vocab_size": manifest.vocab_size,
        "train_tokens": manifest.num_tokens("train"),
        "val_tokens": manifest.num_tokens("val"),
        "digest": manifest.digest,
    }


def write_dataset(
    folder: Path,
    documents: Iterable[LabelledDocument],
    model: Path,
    vocab_size: int,
    source: dict[str, Any],
    name: str,
) -> Manifest:
    """Encode labelled documents into shards in `folder`, which holds the tokenizer already, and
    write the manifest. With a CaseOps tokenizer, capitals become marks first, and the validation
    shards get a byte side-car. Raises DataError when a split gets no token or the vocabulary is not
    the tokenizer's."""
    tokenizer = load_tokenizer(model)
    if tokenizer.vocab_size() != vocab_size or vocab_size > MAX_VOCAB_SIZE:
        raise DataError(
            f"{model.name} has {tokenizer.vocab_size()} pieces, asked for {vocab_size} (at most "
            f"{MAX_VOCAB_SIZE}); ask for --vocab-size {tokenizer.vocab_size()} or give another "
            "tokenizer"
        )
    byte_writer: ShardWriter | None = None
    with ExitStack() as stack:
        writers: dict[Split, ShardWriter] = {
            split: stack.enter_context(ShardWriter(folder, name, split))
            for split in ("train", "val")
        }
        if case_mark_ids(tokenizer):
            documents = ((split, encode_case(text)) for split, text in documents)
            byte_writer = stack.enter_context(ShardWriter(folder, name, "val_bytes"))
            count_bytes = original_bytes_counter(model)
        for split, tokens in encode_documents(tokenizer, documents):
            writers[split].append(tokens)
            if byte_writer is not None and split == "val":
                byte_writer.append(count_bytes(tokens))
    for split, writer in writers.items():
        if writer.num_tokens == 0:
            raise DataError(
                f"the text leaves no document for the {split} split; give more documents (separate "
                "them by NUL bytes), or validation texts of their own"
            )
    shards: dict[Split, list[Path]] = {split: writer.paths for split, writer in writers.items()}
    val_bytes = byte_writer.paths if byte_writer is not None else []
    manifest = current_manifest(folder, shards, model, vocab_size, source, val_bytes)
    if not (folder / FILE_NAME).is_file():
        raise DataError(f"{folder}: {FILE_NAME} could not be written; free space and try again")
    return manifest


def encode_documents(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: Iterable[LabelledDocument]
) -> Iterator[tuple[Split, Tokens]]:
    """BOS and tokens of each document, in order, encoded in batches on all cores."""
    num_threads = len(os.sched_getaffinity(0))
    for batch in _batches(documents):
        segments = [_segments(text) for _, text in batch]
        encoded = iter(
            tokenizer.encode(
                [segment for parts in segments for segment in parts],
                out_type=int,
                num_threads=num_threads,
            )
        )
        for (split, _), parts in zip(batch, segments, strict=True):
            tokens = [BOS_ID, *next(encoded)]
            for _ in parts[1:]:
                tokens += next(encoded)[1:]
            if len(tokens) > 1:
                yield split, np.array(tokens, dtype=np.uint16)


def cut_before(text: str, position: int) -> int:
    """The first space or line end at or after `position`, else the end of the text."""
    found = [at for mark in " \n" if (at := text.find(mark, position)) >= 0]
    return min(found, default=len(text))


def _batches(documents: Iterable[LabelledDocument]) -> Iterator[list[LabelledDocument]]:
    batch: list[LabelledDocument] = []
    size = 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _segments(text: str) -> list[str]:
    """A document in parts of about SEGMENT_CHARS whose tokens join to the tokens of the whole.

    Cuts are before a space, where no piece can cross. The tokenizer drops a leading space, so every
    part but the first is given a full stop to stand before it, whose token the caller drops.
    """
    parts = []
    start = 0
    while len(text) - start > SEGMENT_CHARS:
        end = cut_before(text, start + SEGMENT_CHARS)
        parts.append(text[start:end])
        start = end
    parts.append(text[start:])
    return [part if number == 0 else "." + part for number, part in enumerate(parts)]
