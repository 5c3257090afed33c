"""The training shards as one endless stream of tokens, addressed by absolute position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from trainer.data.shards import Tokens, open_shard


class TokenStream:
    """Shards in order, joined end to start: position p is token p modulo the total."""

    def __init__(self, shards: Sequence[Path], at_most: int | None = None) -> None:
        """`at_most`: tokens that are used, the first ones; None = all."""
        self.shards = [open_shard(path) for path in shards]
        if at_most is not None:
            begins = accumulate((len(shard) for shard in self.shards), initial=0)
            pairs = zip(self.shards, begins, strict=False)
            self.shards = [shard[: at_most - begin] for shard, begin in pairs if begin < at_most]
        self._ends = list(accumulate(len(shard) for shard in self.shards))
        self.num_tokens = self._ends[-1]

    def read(self, start: int, count: int) -> Tokens:
        """The `count` tokens from absolute position `start`, across shards and around the end."""
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            position = (start + filled) % self.num_tokens
            index = bisect_right(self._ends, position)
            shard = self.shards[index]
            offset = position - (self._ends[index] - len(shard))
            part = shard[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out
