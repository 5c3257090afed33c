"""A data folder of random tokens for any vocabulary, for figures that do not depend on the text.

Its tokenizer is trained on invented words, because a data set must have as many pieces as the
model's vocabulary; the tokens are drawn alike, with a BOS every few hundred.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.documents import BOS_ID
from trainer.data.shards import ShardWriter
from trainer.data.tokenizer import train_tokenizer

DOCUMENT_TOKENS = 400
"""Between two BOS, on average."""
SENTENCES, SENTENCE_WORDS = 400, 100


def write_random_data(
    folder: Path, vocab_size: int, train_tokens: int, val_tokens: int, seed: int = 0
) -> Path:
    """Write shards and a tokenizer of `vocab_size` pieces into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    train_tokenizer(_sentences(vocab_size, generator), vocab_size, folder / "random.model")
    for split, count in (("train", train_tokens), ("val", val_tokens)):
        tokens = generator.integers(4, vocab_size, count, dtype=np.uint16)
        tokens[generator.random(count) < 1 / DOCUMENT_TOKENS] = BOS_ID
        tokens[0] = BOS_ID
        with ShardWriter(folder, "random", "val" if split == "val" else "train") as writer:
            writer.append(tokens)
    return folder


def _sentences(num_words: int, generator: np.random.Generator) -> list[str]:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = [
        "".join(letters[generator.integers(0, len(letters), generator.integers(2, 9))])
        for _ in range(num_words)
    ]
    drawn = generator.integers(0, num_words, (SENTENCES, SENTENCE_WORDS))
    return [" ".join(words[place] for place in row) for row in drawn]
