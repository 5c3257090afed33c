"""Which rows of the stream a lane takes at each step, by data.loader.

A row of T tokens is the T + 1 tokens from its start (the last is only a target). An order says the
starts of a lane's rows at a position of the run. It is a pure function of the data, the seed, the
lane and the position, whatever the number of workers, so a saved position is one integer and two
runs of one seed read the same rows.

"sequential" and "document" cut contiguous spans; "shuffled" and "coprime" draw windows, each lane
from its own part of every shard, so that lanes never read the same text within an epoch. (The
published loaders seed alike on all workers or deal out whole shards; the first overlaps once row
lengths differ, the second needs as many shards as workers.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.documents import BOS_ID
from trainer.data.shards import SCAN_TOKENS, Tokens
from trainer.errors import DataError
from trainer.mix import Lane

Starts = NDArray[np.int64]
"""Absolute positions in the stream of a lane's rows at one step."""
RowOrder = Callable[[int], Starts]
"""From the position of the run, in tokens since its start, to the rows of the step there."""


@dataclass(frozen=True)
class LanePlace:
    """One lane among all those of a step."""

    lanes: tuple[Lane, ...]
    index: int
    seed: int
    multiple: int = 1
    """Of rows in an epoch, where that is a setting."""

    @property
    def lane(self) -> Lane:
        """The lane itself."""
        return self.lanes[self.index]

    @property
    def offset(self) -> int:
        """Tokens of the lanes before it, where a step is one span."""
        return sum(lane.num_tokens for lane in self.lanes[: self.index])

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step over all lanes."""
        return sum(lane.num_tokens for lane in self.lanes)

    def rows(self) -> Starts:
        """Starts of the lane's rows from the start of a span."""
        return self.offset + self.lane.seq_len * np.arange(self.lane.num_rows, dtype=np.int64)


def sequential_order(shards: Sequence[Tokens], place: LanePlace) -> RowOrder:
    """Step by step through the stream, across documents and shards (the challenge's baseline)."""
    rows = place.rows()
    return lambda position: position + rows


def document_order(shards: Sequence[Tokens], place: LanePlace) -> RowOrder:
    """Spans of one shard each, the first of a shard starting at its first document; what is left of
    a shard after its last whole span is dropped (parameter-golf #1530)."""
    rows, batch = place.rows(), place.batch_tokens
    spans, shard_start = [], 0
    for shard in shards:
        first = _first_document(shard)
        count = max(0, (len(shard) - 1 - first) // batch)
        spans.append(shard_start + first + batch * np.arange(count, dtype=np.int64))
        shard_start += len(shard)
    starts = np.concatenate(spans)
    if not len(starts):
        raise DataError(_too_small("document", f"a shard with one step of {batch} tokens"))
    return lambda position: starts[position // batch % len(starts)] + rows


def _first_document(shard: Tokens) -> int:
    for start in range(0, len(shard), SCAN_TOKENS):
        found = np.flatnonzero(shard[start : start + SCAN_TOKENS] == BOS_ID)
        if len(found):
            return start + int(found[0])
    return 0


@dataclass(frozen=True)
class _Windows:
    """A lane's parts of the shards, cut into windows of T tokens.

    A part of n tokens has floor((n - T) / T) windows: as many as fit after any phase below T, so
    that the number does not depend on the phase.
    """

    starts: Starts
    """Where each part begins in the stream."""
    counts: NDArray[np.int64]
    """Windows in each."""

    @classmethod
    def of(cls, shards: Sequence[Tokens], place: LanePlace, loader: str) -> _Windows:
        seq_len, starts, counts, shard_start = place.lane.seq_len, [], [], 0
        for shard in shards:
            first, end = (
                len(shard) * i // len(place.lanes) for i in (place.index, place.index + 1)
            )
            starts.append(shard_start + first)
            counts.append(max(0, (end - first - seq_len) // seq_len))
            shard_start += len(shard)
        windows = cls(np.array(starts, dtype=np.int64), np.array(counts, dtype=np.int64))
        if windows.counts.sum() < place.lane.num_rows:
            raise DataError(
                _too_small(
                    loader,
                    f"{place.lane.num_rows} rows of {seq_len} tokens for each of "
                    f"{len(place.lanes)} lanes",
                )
            )
        return windows


def shuffled_order(shards: Sequence[Tokens], place: LanePlace) -> RowOrder:
    """Every window once an epoch, in random order, from a random phase in each shard.

    parameter-golf #1394 draws, for each row, a shard with probability proportional to the windows
    it has left, and takes the next of that shard's random permutation. That is a random
    permutation of all windows, which is how it is done here.
    """
    windows, lane = _Windows.of(shards, place, "shuffled"), place.lane
    num_windows = int(windows.counts.sum())
    part = np.repeat(np.arange(len(windows.counts)), windows.counts)
    within = np.concatenate([np.arange(count) for count in windows.counts])

    @lru_cache(maxsize=2)  # a step may lie across the end of an epoch
    def epoch(number: int) -> Starts:
        generator = np.random.default_rng([place.seed, place.index, number])
        phases = generator.integers(lane.seq_len, size=len(windows.starts))
        starts: Starts = (windows.starts + phases)[part] + lane.seq_len * within
        return generator.permutation(starts)

    def order(position: int) -> Starts:
        first = position // place.batch_tokens * lane.num_rows
        rows = range(first, first + lane.num_rows)
        return np.array([epoch(row // num_windows)[row % num_windows] for row in rows], np.int64)

    return order


RAMP_STEPS = 1800
"""Steps over which the coprime loader goes from its first to its last settings."""
SHARDS_PER_STEP = (8, 32)
"""Shards that a step draws from, at first and at last; all, where there are fewer."""
REMAINING_POWER = (0.9, 0.5)
"""Exponent of a shard's remaining windows in its probability, at first and at last."""


class CoprimeOrder:
    """Windows of a shard in steps of a stride that has no common divisor with their number, so that
    all are visited without a permutation; each step draws from a few shards and interleaves them
    (parameter-golf #726, #1060).

    An epoch ends when fewer windows than a step's are left; phases, first windows and strides are
    then drawn anew. Going back to an earlier position replays the plan from its start.
    """

    def __init__(self, shards: Sequence[Tokens], place: LanePlace) -> None:
        self._place = place
        self._windows = _Windows.of(shards, place, "coprime")
        self._restart()

    def __call__(self, position: int) -> Starts:
        step = position // self._place.batch_tokens
        if step < self._next_step:
            self._restart()
        while True:
            starts = self._plan(self._next_step)
            self._next_step += 1
            if self._next_step > step:
                return starts

    def _restart(self) -> None:
        self._next_step = 0
        self._generator = np.random.default_rng([self._place.seed, self._place.index])
        self._start_epoch()

    def _start_epoch(self) -> None:
        draw, counts = self._generator.integers, self._windows.counts
        self._phases = draw(self._place.lane.seq_len, size=len(counts))
        self._firsts = [int(draw(max(1, count))) for count in counts]
        self._strides = [self._coprime_to(int(count)) for count in counts]
        self._taken = np.zeros_like(counts)

    def _coprime_to(self, count: int) -> int:
        while count > 1:
            stride = int(self._generator.integers(1, count))
            if math.gcd(stride, count) == 1:
                return stride
        return 1

    def _plan(self, step: int) -> Starts:
        num_rows = self._place.lane.num_rows
        if (self._windows.counts - self._taken).sum() < num_rows:
            self._start_epoch()
        starts: list[int] = []
        while len(starts) < num_rows:
            chosen = self._choose_shards(min(1.0, step / RAMP_STEPS))
            # Around the chosen shards until the step is full or they are empty.
            while chosen and len(starts) < num_rows:
                chosen = [shard for shard in chosen if self._left(shard)]
                starts += [self._take(shard) for shard in chosen[: num_rows - len(starts)]]
        return np.array(starts, dtype=np.int64)

    def _choose_shards(self, ramp: float) -> list[int]:
        few, many = SHARDS_PER_STEP
        first, last = REMAINING_POWER
        left = self._windows.counts - self._taken
        weights = np.where(left > 0, left.astype(np.float64), 0.0) ** (
            first + ramp * (last - first)
        )
        weights[left <= 0] = 0.0
        size = min(int(np.count_nonzero(weights)), round(few + ramp * (many - few)))
        chosen = self._generator.choice(
            len(left), size=size, replace=False, p=weights / weights.sum()
        )
        return [int(shard) for shard in chosen]

    def _left(self, shard: int) -> int:
        return int(self._windows.counts[shard] - self._taken[shard])

    def _take(self, shard: int) -> int:
        count = int(self._windows.counts[shard])
        taken = int(self._taken[shard])
        window = (self._firsts[shard] + taken * self._strides[shard]) % count
        self._taken[shard] += 1
        start = self._windows.starts[shard] + self._phases[shard]
        return int(start) + window * self._place.lane.seq_len


ROW_ORDERS: dict[str, Callable[[Sequence[Tokens], LanePlace], RowOrder]] = {
    "sequential": sequential_order,
    "document": document_order,
    "shuffled": shuffled_order,
    "coprime": CoprimeOrder,
}
"""By data.loader."""
CONTIGUOUS = ("sequential", "document")
"""Orders whose rows at a step follow one another without a gap."""


def _too_small(loader: str, need: str) -> str:
    return (
        f'data.loader = "{loader}": the training set has no {need}; lower data.batch_tokens, give '
        'more text, or set data.loader to "sequential"'
    )
