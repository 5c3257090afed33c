"""SentencePiece, with the challenge's options and errors in this package's words."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from trainer.errors import DataError

SPACE_MARK = "\u2581"
"""How a SentencePiece piece spells a space."""
SENTENCE = re.compile(r".{1,1000}(?=\s|\Z)|.{1,1000}", re.DOTALL)
"""Up to 1000 characters that end before white space, where there is any: SentencePiece drops what
has more than 4192 bytes, and a character has at most 4."""
SAMPLE_SENTENCES = 20_000
"""Sentences that a tokenizer is trained on: up to 20 MB, drawn evenly from the text."""


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer in a .model file.

    Raises DataError when it is absent or unreadable, or lacks the bare space piece: without one a
    lone space would be spelled as three bytes and every byte count would be wrong.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer; give the path of a SentencePiece .model file")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{path}: not a SentencePiece model ({error}); give a .model file made by SentencePiece"
        ) from None
    if tokenizer.piece_to_id(SPACE_MARK) == tokenizer.unk_id():
        raise DataError(
            f"{path}: has no piece for a lone space (U+2581), so bytes cannot be counted; train it "
            "on text with spaces between words"
        )
    return tokenizer


def train_tokenizer(
    sentences: Iterable[str], vocab_size: int, path: Path, symbols: Sequence[str] = ()
) -> None:
    """Train a BPE tokenizer with the options of the challenge and write it to `path`.

    The normaliser is nmt_nfkc: compatibility characters are folded, line ends and tabs become
    spaces, and runs of spaces become one. Token and byte counts then describe that normalised text.
    The same sentences give the same file. Each of `symbols` becomes a piece that is never cut or
    joined, such as the marks of CaseOps. Raises DataError when the text cannot fill the vocabulary
    or its characters do not fit in it.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(symbols),
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"no tokenizer of {vocab_size} pieces can be trained on this text "
            f"({str(error).strip()}); give more text, or another vocabulary size (at least 260 for "
            "the byte and control pieces, and more for the characters)"
        ) from None
    path.write_bytes(model.getvalue())
    found = load_tokenizer(path).vocab_size()
    if found != vocab_size:
        raise DataError(
            f"this text fills only {found} of {vocab_size} pieces; give more text, or ask for a "
            f"vocabulary of {found}"
        )


def sample_sentences(documents: Iterable[str], size: int = SAMPLE_SENTENCES) -> list[str]:
    """An even sample of the documents' sentences in the order of the text (reservoir sampling with
    a fixed seed), each at most 1000 characters long."""
    generator = random.Random(0)
    kept: list[tuple[int, str]] = []
    sentences = (sentence for text in documents for sentence in SENTENCE.findall(text))
    for index, sentence in enumerate(sentences):
        if len(kept) < size:
            kept.append((index, sentence))
        elif (slot := generator.randrange(index + 1)) < size:
            kept[slot] = (index, sentence)
    return [sentence for _, sentence in sorted(kept)]
