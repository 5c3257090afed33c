"""Batches for the optimiser: the same global batch for any number of workers.

Step s of a run takes the tokens at [s * batch_tokens, (s + 1) * batch_tokens] of the stream (one
more than a batch, for the last target), cut into rows of seq_len. Rank r of R has the r-th of R
equal runs of rows. The position is one integer that means the same for any number of workers and,
in sequential order, any batch size, so a run can be resumed on other hardware.

With data.mix, a step is made of lanes with rows of different lengths; rank r has lanes r, r + R,
..., each as micro batches of its own, so that every rank gets its share of the long rows. Other
orders than the sequential one are in `row_order`.

Shapes: B rows of one micro batch, T seq_len.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.config.row_schedule import RowStage, row_len_at, row_stages
from trainer.data.dataset import Dataset
from trainer.data.document_shuffle import (
    ShuffledDocuments,
    rows_per_epoch,
    shuffled_documents_order,
)
from trainer.data.documents import BOS_ID
from trainer.data.row_order import CONTIGUOUS, ROW_ORDERS, LanePlace, RowOrder
from trainer.data.stream import TokenStream
from trainer.distributed import Group
from trainer.errors import ConfigError, DataError
from trainer.mix import Lane, lanes_of, rows_fault, sharing_fault

Read = Callable[[int], np.ndarray]

MicroBatches = list[tuple[Tensor, Tensor]]
"""(x_BT, y_BT) int64 on the device, y one token ahead of x; all of one shape without a mix."""


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
    fault = rows_fault(batch_tokens, seq_len, world_size)
    if fault is not None:
        raise ConfigError(fault)
    num_rows = batch_tokens // seq_len // world_size
    return Share(rank * num_rows, num_rows, _micro_rows(num_rows, seq_len, micro_batch_tokens))


def _micro_rows(num_rows: int, seq_len: int, micro_batch_tokens: int) -> int:
    at_most = max(1, micro_batch_tokens // seq_len)
    return max(n for n in range(1, min(at_most, num_rows) + 1) if num_rows % n == 0)


@dataclass(frozen=True)
class _Piece:
    """A rank's rows of one lane."""

    order: RowOrder
    seq_len: int
    share: Share
    contiguous: bool
    """Rows follow one another in the stream."""
    divisor: float
    """Takes a micro batch's mean loss to its part of the rank's."""

    @property
    def num_values(self) -> int:
        """Tokens to read: one more than the rows have, or one more for each row."""
        rows = self.share.num_rows
        return rows * self.seq_len + (1 if self.contiguous else rows)

    @property
    def num_micro_batches(self) -> int:
        return self.share.num_rows // self.share.micro_rows


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
        *,
        lanes: Sequence[Lane] = (),
        weighting: Literal["token", "worker"] = "token",
        loader: str = "sequential",
        split: str = "train",
        seed: int = 0,
        stages: tuple[RowStage, ...] = (),
        train_tokens: int | None = None,
        epoch_multiple: int = 1,
        bos_id: int = BOS_ID,
    ) -> None:
        """
        Args:
            lanes: of a mix, a multiple of world_size; () = all rows of seq_len.
            weighting: what counts alike in the gradient, tokens or lanes.
            loader: key of ROW_ORDERS.
            split: "train", "val" or "both".
            seed: of random orders.
            stages: of data.seq_len_schedule; () = rows do not change.
            epoch_multiple: of rows in an epoch, for "shuffled_documents".
            bos_id: token that begins a document, for the same.
            train_tokens: most distinct tokens to use, the first; None = all.
        """
        chosen = _shards_of(dataset, split)
        stream = TokenStream(chosen, train_tokens)
        self._epoch_tokens = stream.num_tokens
        if loader == "shuffled_documents":
            stream = ShuffledDocuments(chosen, train_tokens, seed, bos_id)
            used = rows_per_epoch(stream.num_tokens, seq_len, epoch_multiple)
            self._epoch_tokens = used * seq_len
        _check_size(dataset, stream.num_tokens, batch_tokens)
        self._stream = stream
        self._digest = dataset.digest
        self._batch_tokens = batch_tokens
        self._loader = loader
        self._device = device
        self._position = 0
        self._is_thinned = False
        if lanes:
            self._pieces = [
                self._lane_piece(
                    LanePlace(tuple(lanes), i, seed), micro_batch_tokens, weighting, world_size
                )
                for i in range(rank, len(lanes), world_size)
            ]
        else:
            share = share_of_batch(seq_len, batch_tokens, micro_batch_tokens, rank, world_size)
            lane = Lane(seq_len, batch_tokens // seq_len)
            place = LanePlace((lane,), 0, seed, epoch_multiple)
            self._pieces = [self._piece(place, share, share.num_rows // share.micro_rows)]
            _check_stages(stages, share.micro_rows * seq_len)
        self._stages = stages
        self._prefetch = _Prefetch(device) if device.type == "cuda" else None

    @classmethod
    def from_config(cls, dataset: Dataset, config: TrainConfig, group: Group) -> Self:
        """The loader of a run on this rank."""
        data = config.data
        fault = sharing_fault(data, group.size)
        if fault is not None:
            raise ConfigError(fault)
        return cls(
            dataset,
            data.seq_len,
            data.batch_tokens,
            data.micro_batch_tokens,
            group.rank,
            group.size,
            group.device,
            lanes=lanes_of(data) if data.mix else (),
            weighting=data.mix_weighting,
            loader=data.loader,
            split=data.train_split,
            seed=(
                data.shuffle_seed if data.loader == "shuffled_documents" else config.runtime.seed
            ),
            epoch_multiple=data.epoch_multiple,
            bos_id=config.model.bos_id,
            stages=row_stages(data) if data.seq_len_schedule else (),
            train_tokens=config.budget.train_tokens,
        )

    def _lane_piece(
        self, place: LanePlace, micro_batch_tokens: int, weighting: str, world_size: int
    ) -> _Piece:
        """The whole of a lane. Divided by its divisor and averaged over ranks, its micro batches'
        mean losses become the mean over lanes, or over tokens."""
        lane = place.lane
        micro_rows = _micro_rows(lane.num_rows, lane.seq_len, micro_batch_tokens)
        divisor = len(place.lanes) / world_size * (lane.num_rows / micro_rows)
        if weighting == "token":
            divisor = place.batch_tokens / (world_size * micro_rows * lane.seq_len)
        return self._piece(place, Share(0, lane.num_rows, micro_rows), divisor)

    def _piece(self, place: LanePlace, share: Share, divisor: float) -> _Piece:
        is_shuffled = self._loader == "shuffled_documents"
        make_order = shuffled_documents_order if is_shuffled else ROW_ORDERS[self._loader]
        order = make_order(self._stream.shards, place)
        return _Piece(order, place.lane.seq_len, share, self._loader in CONTIGUOUS, divisor)

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of a whole step."""
        return sum(piece.num_micro_batches for piece in self._pieces)

    @property
    def divisors(self) -> list[float]:
        """For each micro batch that `next_step` returns, what to divide its mean loss by, so that
        their sum, averaged over ranks, is the loss of the step."""
        return self._chosen(
            [piece.divisor for piece in self._pieces for _ in range(piece.num_micro_batches)]
        )

    @contextmanager
    def one_of_each_shape(self, is_on: bool = True) -> Iterator[None]:
        """Inside, a step has only the first micro batch of every shape: for priming."""
        self._is_thinned, before = is_on, self._is_thinned
        try:
            yield
        finally:
            self._is_thinned = before

    def _chosen(self, micro_batches: list[Any]) -> list[Any]:
        """Of one item for each micro batch, those of the present step."""
        if not self._is_thinned:
            return micro_batches
        kinds = [
            (piece.share.micro_rows, piece.seq_len)
            for piece in self._pieces
            for _ in range(piece.num_micro_batches)
        ]
        return [micro_batches[kinds.index(kind)] for kind in dict.fromkeys(kinds)]

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self._position / self._epoch_tokens

    @property
    def epoch_number(self) -> int:
        """Epoch of the first row of the next step, from 1: what schedules by epoch follow."""
        return self._position // self._epoch_tokens + 1

    def next_step(self, progress: float = 1.0) -> MicroBatches:
        """This rank's micro batches for one optimiser step, and move on.

        Args:
            progress: share of the budget that is spent, which says how long rows are now.
        """
        seq_len = row_len_at(self._stages, progress) if self._stages else 0
        position = self._position
        self._position += self._batch_tokens
        if self._prefetch is None:
            return self._split(torch.from_numpy(self._read(position)), seq_len)
        tokens = self._prefetch.take(position, self._read)
        self._prefetch.start(self._position, self._read)
        return self._split(tokens, seq_len)

    def state_dict(self) -> dict[str, Any]:
        """The position of the next step, in tokens from the start of the first epoch."""
        return {"position": self._position, "digest": self._digest, "loader": self._loader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position. Raises DataError when it belongs to other data."""
        if state["digest"] != self._digest:
            raise DataError(
                f"the saved position belongs to data {state['digest']}, this is {self._digest}; "
                "open the data that the run began with"
            )
        order = state.get("loader", "sequential")
        if order != self._loader:
            raise DataError(
                f'the saved position belongs to data.loader = "{order}", this is "{self._loader}"; '
                "go on with the loader that the run began with"
            )
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop the background thread, if there is one."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _read(self, position: int) -> np.ndarray:
        """int64 tokens of all rows of this rank at the step that starts at `position`, piece after
        piece."""
        return np.concatenate([self._read_piece(piece, position) for piece in self._pieces])

    def _read_piece(self, piece: _Piece, position: int) -> np.ndarray:
        share, length = piece.share, piece.seq_len
        starts = piece.order(position)[share.first_row : share.first_row + share.num_rows]
        if piece.contiguous:
            return self._stream.read(int(starts[0]), piece.num_values).astype(np.int64)
        rows = [self._stream.read(int(start), length + 1) for start in starts]
        return np.concatenate(rows).astype(np.int64)

    def _split(self, tokens: Tensor, seq_len: int) -> MicroBatches:
        """`seq_len`: of the present stage, which only contiguous rows may differ in; 0 = their
        own."""
        micro_batches: MicroBatches = []
        sizes = [piece.num_values for piece in self._pieces]
        for piece, part in zip(self._pieces, torch.split(tokens, sizes), strict=True):
            shape = (-1, piece.share.micro_rows, piece.seq_len)
            if piece.contiguous:
                if seq_len:
                    shape = (-1, shape[1] * shape[2] // seq_len, seq_len)
                x, y = part[:-1].view(shape), part[1:].view(shape)
            else:
                rows = part.view(-1, piece.seq_len + 1)
                x, y = rows[:, :-1].reshape(shape), rows[:, 1:].reshape(shape)
            micro_batches += zip(x, y, strict=True)
        return self._chosen(micro_batches)


def _shards_of(dataset: Dataset, split: str) -> Sequence[Path]:
    """Shards of "train", "val" or "both"."""
    if split == "both":
        return [*dataset.train_shards, *dataset.val_shards]
    return dataset.val_shards if split == "val" else dataset.train_shards


def _check_size(dataset: Dataset, num_tokens: int, batch_tokens: int) -> None:
    if num_tokens <= batch_tokens:
        raise DataError(
            f"{dataset.dir}: {num_tokens} training tokens are less than one step of "
            f"data.batch_tokens = {batch_tokens}; lower it or give more text"
        )


def _check_stages(stages: tuple[RowStage, ...], micro_tokens: int) -> None:
    bad = sorted({stage.seq_len for stage in stages if micro_tokens % stage.seq_len})
    if bad:
        raise ConfigError(
            f"a worker's micro batch has {micro_tokens} tokens here, which rows of "
            f"{', '.join(map(str, bad))} tokens in data.seq_len_schedule do not divide; choose "
            "data.batch_tokens and data.micro_batch_tokens so that they do"
        )


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
