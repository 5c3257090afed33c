"""How much of the training text is also validation text: found before anything is trained on it.

15 of 34 published CaseOps runs had trained on four fifths of their validation text, because a
script took 10,000 documents for validation where the score took 50,000 (parameter-golf #2127). The
first tokens of the training text show it. Honest data has a few windows of boilerplate in common.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import Dataset
from trainer.data.shards import SCAN_TOKENS, Tokens, open_shard
from trainer.data.window_hash import window_hashes
from trainer.errors import DataError

WINDOW = 64
"""Tokens of a window, about 250 bytes of text."""
TRAIN_TOKENS = 10_000_000
"""Tokens looked at, from the start of the training text."""
WORTH_A_WARNING = 0.01
"""Share from which to say something about data that was just made."""
_FILTER_BITS = 24


@dataclass(frozen=True)
class Overlap:
    """Windows of the validation text, side by side, that occur anywhere in the training text."""

    train_tokens: int
    """Looked at."""
    found: int
    """Places in them where such a window begins."""
    val_windows: int

    @property
    def share(self) -> float:
        """Of the training tokens looked at, as many as lie in those windows."""
        return min(1.0, self.found * WINDOW / max(1, self.train_tokens))

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.2f} % of the first {self.train_tokens:,} training tokens are also "
            f"in the validation text ({self.found:,} times one of its {self.val_windows:,} windows "
            f"of {WINDOW} tokens)"
        )


def measure_overlap(dataset: Dataset, train_tokens: int = TRAIN_TOKENS) -> Overlap:
    """Compare the start of the training text with all of the validation text. About 3 s for 10
    million tokens against 60 million."""
    keys = np.unique(
        np.concatenate(
            [window_hashes(open_shard(path), WINDOW, step=WINDOW) for path in dataset.val_shards]
        )
    )
    looked_at = found = 0
    for path in dataset.train_shards:
        tokens = open_shard(path)[: train_tokens - looked_at]
        looked_at += len(tokens)
        found += _count(tokens, keys)
    return Overlap(looked_at, found, len(keys))


def check_overlap(dataset: Dataset, most: float) -> None:
    """Raises DataError when a larger share of the training text than `most` is validation text;
    1 = not looked at. For data.max_overlap, before training."""
    if most >= 1:
        return
    overlap = measure_overlap(dataset)
    if overlap.share > most:
        raise DataError(
            f"{dataset.dir}: {overlap}, more than data.max_overlap = {most:g}; the split is wrong: "
            "prepare the data again with validation texts of their own, or raise data.max_overlap"
        )


def _count(tokens: Tokens, keys: NDArray[np.uint64]) -> int:
    """Places of `tokens` whose window has one of the keys."""
    mask = np.uint64((1 << _FILTER_BITS) - 1)
    may_be_known = np.zeros(1 << _FILTER_BITS, dtype=np.bool_)
    may_be_known[keys & mask] = True
    found = 0
    for start in range(0, len(tokens), SCAN_TOKENS):
        own = window_hashes(tokens[start : start + SCAN_TOKENS + WINDOW - 1], WINDOW)
        own = own[may_be_known[own & mask]]
        found += int(np.isin(own, keys).sum())
    return found
