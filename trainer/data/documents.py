"""Where documents begin in a token stream: every document opens with BOS and has no end mark.

Separate from the loader, which streams across documents; attention masks, per-document evaluation
and shuffling by document start here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import SCAN_TOKENS, Tokens

BOS_ID = 1
"""The challenge's tokenizers put pad 0, BOS 1, EOS 2, unknown 3."""


def document_starts(tokens: Tokens, bos_id: int = BOS_ID) -> NDArray[np.int64]:
    """Ascending positions at which a document starts: 0 and every BOS.

    Position 0 counts even without BOS, because a shard may begin in the middle of a document.
    """
    found = [
        np.flatnonzero(tokens[start : start + SCAN_TOKENS] == bos_id) + start
        for start in range(0, len(tokens), SCAN_TOKENS)
    ]
    if not found:
        return np.zeros(0, dtype=np.int64)
    starts = np.concatenate(found).astype(np.int64)
    return starts if len(starts) and starts[0] == 0 else np.insert(starts, 0, 0)


def document_lengths(tokens: Tokens, bos_id: int = BOS_ID) -> NDArray[np.int64]:
    """Tokens per document, BOS included; the sum is len(tokens)."""
    return np.diff(document_starts(tokens, bos_id), append=len(tokens))
