"""Several epochs over one text, its documents in another order each time (slowrun's loader).

An epoch is all documents, one after another, cut into rows of T + 1 tokens side by side; what is
left over is dropped, and documents run into each other. The first epoch keeps the documents' order.
Epoch e > 1 permutes the documents of epoch e - 1, so that permutations compose, and cuts anew. Rows
are permuted in every epoch. So a run of many epochs seldom sees a row twice: slowrun's one-hour
record went from 3.211 to 3.204 nats by it.

Generators are torch's, seeded e for documents and e + 1000 for rows (plus a million times
data.shuffle_seed), so that seed 0 gives the published order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.documents import BOS_ID, document_starts
from trainer.data.row_order import LanePlace, RowOrder, Starts
from trainer.data.shards import Tokens
from trainer.data.stream import TokenStream
from trainer.errors import DataError

SEEDS_APART = 1_000_000
"""Between the seeds of two values of data.shuffle_seed."""
ROWS_SEED = 1000
"""From the seed of an epoch's documents to that of its rows."""

Order = NDArray[np.int64]


class ShuffledDocuments(TokenStream):
    """The epochs one after another: position p is token p mod n of epoch p // n + 1, of n tokens
    in all."""

    def __init__(
        self,
        shards: Sequence[Path],
        at_most: int | None = None,
        seed: int = 0,
        bos_id: int = BOS_ID,
    ) -> None:
        super().__init__(shards, at_most)
        begins = self._ends[:-1]
        parts = [
            document_starts(shard, bos_id)[int(begin > 0 and shard[0] != bos_id) :] + begin
            for shard, begin in zip(self.shards, [0, *begins], strict=True)
        ]
        self._starts = np.concatenate(parts)
        self._lengths = np.diff(self._starts, append=self.num_tokens)
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._lay_out)  # a step may lie across an epoch's end

    def _lay_out(self, number: int) -> tuple[Order, Order]:
        """Documents of an epoch in order, and where each ends in it."""
        order = np.arange(len(self._starts))
        for epoch in range(2, number + 1):
            order = order[permutation(len(order), epoch + SEEDS_APART * self._seed)]
        return order, np.cumsum(self._lengths[order])

    def read(self, start: int, count: int) -> Tokens:
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            epoch, position = divmod(start + filled, self.num_tokens)
            order, ends = self._epoch(epoch + 1)
            index = bisect_right(ends, position)
            document = order[index]
            left = int(ends[index]) - position
            size = min(left, count - filled)
            first = int(self._starts[document] + self._lengths[document]) - left
            out[filled : filled + size] = super().read(first, size)
            filled += size
        return out


def shuffled_documents_order(shards: Sequence[Tokens], place: LanePlace) -> RowOrder:
    """Rows in the stream of ShuffledDocuments; an epoch has whole multiples of place.multiple."""
    lane, num_tokens = place.lane, sum(len(shard) for shard in shards)
    length = lane.seq_len + 1
    num_rows = num_tokens // length
    used = rows_per_epoch(num_tokens, lane.seq_len, place.multiple)

    @lru_cache(maxsize=2)
    def epoch(number: int) -> Starts:
        seed = number + ROWS_SEED + SEEDS_APART * place.seed
        return (number - 1) * num_tokens + length * permutation(num_rows, seed)

    def order(position: int) -> Starts:
        first = position // place.batch_tokens * lane.num_rows
        rows = range(first, first + lane.num_rows)
        return np.array([epoch(row // used + 1)[row % used] for row in rows], np.int64)

    return order


def rows_per_epoch(num_tokens: int, seq_len: int, multiple: int) -> int:
    """Rows of an epoch that are trained on. Raises DataError when there is none."""
    rows = num_tokens // (seq_len + 1) // multiple * multiple
    if rows == 0:
        raise DataError(
            f'data.loader = "shuffled_documents": {num_tokens} training tokens are not '
            f"data.epoch_multiple = {multiple} rows of {seq_len + 1}; lower it, or give more text"
        )
    return rows


def permutation(count: int, seed: int) -> Order:
    """The permutation that torch draws for a seed on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    order: Order = torch.randperm(count, generator=generator).numpy()
    return order
