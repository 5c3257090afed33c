"""Batches for the optimiser: the same global batch for any number of workers.

Step s of a run takes the tokens at [s * batch_tokens, (s + 1) * batch_tokens] of the stream (one
more than a batch, for the last target), cut into rows of seq_len. Rank r of R has the r-th of R
equal runs of rows. The position is one integer that means the same for any number of workers and
any batch size, so a run can be resumed on other hardware.

Shapes: B rows of one micro batch, T seq_len.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.dataset import Dataset
from trainer.data.stream import TokenStream
from trainer.errors import ConfigError, DataError

Read = Callable[[int], np.ndarray]

MicroBatches = list[tuple[Tensor, Tensor]]
"""(x_BT, y_BT) int64 on the device, y one token ahead of x; all of one shape."""


@dataclass(frozen=True)
class Share:
    """What one rank takes of every step."""

    first_row: int
    num_rows: int
    micro_rows: int
    """Rows of a micro batch; divides num_rows, so that all micro batches weigh the same."""


def share_of_batch(
    seq_len: int, batch_tokens: int, micro_batch_tokens: int, rank: int, world_size: int
) -> Share:
    """Divide a step's rows among ranks and a rank's rows among micro batches.

    A micro batch has the most rows that fit in micro_batch_tokens and divide the rank's rows.
    Raises ConfigError when the rows cannot be shared equally.
    """
    rows = batch_tokens // seq_len
    if rows % world_size or not rows:
        row_count = max(world_size, rows - rows % world_size)
        raise ConfigError(
            f"data.batch_tokens = {batch_tokens} is {rows} rows of data.seq_len = {seq_len}, which "
            f"{world_size} workers cannot share equally; set data.batch_tokens = "
            f"{row_count * seq_len}, or use a number of workers that divides {rows}"
        )
    num_rows = rows // world_size
    at_most = max(1, micro_batch_tokens // seq_len)
    micro_rows = max(n for n in range(1, min(at_most, num_rows) + 1) if num_rows % n == 0)
    return Share(rank * num_rows, num_rows, micro_rows)


class TrainLoader:
    """Deterministic batches of one rank. On cuda the next step is read, pinned and copied by a
    background thread while the present one computes.

    Raises ConfigError when the batch cannot be shared equally, DataError when the data set is
    smaller than one step.
    """

    def __init__(
        self,
        dataset: Dataset,
        seq_len: int,
        batch_tokens: int,
        micro_batch_tokens: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        if dataset.train_tokens <= batch_tokens:
            raise DataError(
                f"{dataset.dir}: {dataset.train_tokens} training tokens are less than one step of "
                f"data.batch_tokens = {batch_tokens}; lower it or give more text"
            )
        self._share = share_of_batch(seq_len, batch_tokens, micro_batch_tokens, rank, world_size)
        self._stream = TokenStream(dataset.train_shards)
        self._digest = dataset.digest
        self._seq_len = seq_len
        self._batch_tokens = batch_tokens
        self._device = device
        self._position = 0
        self._prefetch = _Prefetch(device) if device.type == "cuda" else None

    @property
    def num_micro_batches(self) -> int:
        """Micro batches that `next_step` returns."""
        return self._share.num_rows // self._share.micro_rows

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self._position / self._stream.num_tokens

    def next_step(self) -> MicroBatches:
        """This rank's micro batches for one optimiser step, and move on."""
        position = self._position
        self._position += self._batch_tokens
        if self._prefetch is None:
            return self._split(torch.from_numpy(self._read(position)))
        tokens = self._prefetch.take(position, self._read)
        self._prefetch.start(self._position, self._read)
        return self._split(tokens)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next step, in tokens from the start of the first epoch."""
        return {"position": self._position, "digest": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position. Raises DataError when it belongs to other data."""
        if state["digest"] != self._digest:
            raise DataError(
                f"the saved position belongs to data {state['digest']}, this is {self._digest}; "
                "open the data that the run began with"
            )
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop the background thread, if there is one."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _read(self, position: int) -> np.ndarray:
        """[num_rows * T + 1] int64 of this rank, at the step that starts at `position`."""
        start = position + self._share.first_row * self._seq_len
        return self._stream.read(start, self._share.num_rows * self._seq_len + 1).astype(np.int64)

    def _split(self, tokens: Tensor) -> MicroBatches:
        shape = (-1, self._share.micro_rows, self._seq_len)
        return list(zip(tokens[:-1].view(shape), tokens[1:].view(shape), strict=True))


class _Prefetch:
    """Brings one span ahead to the device, from a thread, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="caddie-loader")
        self._ahead: tuple[int, Future[tuple[Tensor, torch.cuda.Event]]] | None = None

    def start(self, position: int, read: Read) -> None:
        self._ahead = (position, self._thread.submit(self._bring, position, read))

    def take(self, position: int, read: Read) -> Tensor:
        """The span at `position`, safe to use on the current stream. A restored position makes the
        span ahead useless; it is then dropped."""
        if self._ahead is None or self._ahead[0] != position:
            self.start(position, read)
        assert self._ahead is not None
        tokens, copied = self._ahead[1].result()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        tokens.record_stream(current)
        return tokens

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _bring(self, position: int, read: Read) -> tuple[Tensor, torch.cuda.Event]:
        pinned = torch.from_numpy(read(position)).pin_memory()
        with torch.cuda.stream(self._stream):
            tokens = pinned.to(self._device, non_blocking=True)
            return tokens, self._stream.record_event()
