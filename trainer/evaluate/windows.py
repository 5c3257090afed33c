"""Which windows of the validation tokens are scored, and which targets of each.

With N targets, windows of T tokens and stride s, windows start at

    {w = 0, s, 2 s, ... : w + T - s < N}

The first scores all its targets, every later one its last s, the last one fewer where the text
ends. So each of the N targets is scored exactly once, and every one but the first T - s is scored
with at least T - s tokens before it. The older published form took every window that holds a token,
and scored the end of the text several times (openai/parameter-golf; reference of #1212).

Shapes: B rows of one forward pass, T tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.dataset import Dataset
from trainer.data.shards import Tokens
from trainer.distributed import Group


@dataclass(frozen=True)
class Rows:
    """Rows of T tokens that go through the model together, and the targets that each scores: of
    the targets starts[b] .. starts[b] + T - 1 of row b those in [firsts[b], ends[b])."""

    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    ends: NDArray[np.int64]
    seq_len: int

    def __len__(self) -> int:
        return len(self.starts)

    def spans(self) -> Iterator[tuple[int, int]]:
        """The ranges of targets that are scored; rows that follow one another count as one."""
        apart = np.flatnonzero(self.firsts[1:] != self.ends[:-1]) + 1
        begins = np.concatenate([[0], apart])
        lasts = np.concatenate([apart, [len(self)]]) - 1
        for begin, last in zip(begins, lasts, strict=True):
            yield int(self.firsts[begin]), int(self.ends[last])

    def targets(self, device: torch.device) -> Tensor:
        """[B, T] index of each target."""
        return _on(self.starts, device) + torch.arange(self.seq_len, device=device)

    def counted(self, device: torch.device) -> Tensor:
        """[B, T] bool: this row is the one that scores this target."""
        targets_BT = self.targets(device)
        return (targets_BT >= _on(self.firsts, device)) & (targets_BT < _on(self.ends, device))


def cut_rows(
    padded: Tokens, rows: Rows, num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(x_BT, y_BT), int64: the rows and zeros up to num_rows; nothing beyond a row's last scored
    target is in them.

    Args:
        padded: the tokens, and zeros for what of the rows lies beyond them.
    """
    view = np.lib.stride_tricks.sliding_window_view(padded, rows.seq_len + 1)
    span = torch.zeros(num_rows, rows.seq_len + 1, dtype=torch.int64)
    span[: len(rows)] = torch.from_numpy(view[rows.starts].astype(np.int64))
    span = _moved(span, device)
    # Copies: parts of a single row count as contiguous, and would share memory.
    x_BT, y_BT = (
        part.clone(memory_format=torch.contiguous_format) for part in (span[:, :-1], span[:, 1:])
    )
    if (rows.ends < rows.starts + rows.seq_len).any():
        hidden_BT = rows.targets(device) >= _on(rows.ends, device)
        x_BT[: len(rows)].masked_fill_(hidden_BT, 0)
        y_BT[: len(rows)].masked_fill_(hidden_BT, 0)
    return x_BT, y_BT


def _on(values_B: NDArray[np.int64], device: torch.device) -> Tensor:
    return _moved(torch.from_numpy(values_B), device)[:, None]


def _moved(host: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it still has to do."""
    if device.type != "cuda":
        return host
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Windows:
    """The windows of one rank and the shape in which they go through the model."""

    seq_len: int
    stride: int
    num_targets: int
    """N, over all ranks."""
    first: int
    """Index of this rank's first window."""
    end: int
    """One more than the index of its last."""
    batch_rows: int

    @property
    def num_batches(self) -> int:
        """Forward passes of this rank."""
        return math.ceil((self.end - self.first) / self.batch_rows)

    def padded(self, tokens: Tokens) -> Tokens:
        """The tokens that are inputs or targets, and zeros for the part of the last windows that
        lies beyond them. Causal models do not see the zeros where anything is counted."""
        return np.concatenate(
            [tokens[: self.num_targets + 1], np.zeros(self.seq_len, dtype=tokens.dtype)]
        )

    def batch(self, batch: int) -> Rows:
        """The windows of the `batch`-th forward pass."""
        first, end = self._span(batch)
        index = np.arange(first, end)
        starts = index * self.stride
        ends = np.minimum(starts + self.seq_len, self.num_targets)
        firsts = np.where(index == 0, 0, starts + self.seq_len - self.stride)
        return Rows(starts, firsts, ends, self.seq_len)

    def rows(self, padded: Tokens, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """(x_BT, y_BT, number of rows that hold a window) of the `batch`-th forward pass."""
        rows = self.batch(batch)
        return *cut_rows(padded, rows, self.batch_rows, device), len(rows)

    def targets(self, batch: int, device: torch.device) -> Tensor:
        """[rows that hold a window, T] index of each target; N and more beyond the text."""
        return self.batch(batch).targets(device)

    def counted(self, batch: int, device: torch.device) -> Tensor:
        """[rows that hold a window, T] bool: this window is the one that scores this target."""
        return self.batch(batch).counted(device)

    def _span(self, batch: int) -> tuple[int, int]:
        first = self.first + batch * self.batch_rows
        return first, min(first + self.batch_rows, self.end)


def num_windows(num_targets: int, seq_len: int, stride: int) -> int:
    """Size of {w = 0, s, 2 s, ... : w + T - s < N}."""
    return math.ceil((num_targets - seq_len) / stride) + 1


def plan_windows(dataset: Dataset, config: EvaluateConfig, group: Group) -> Windows:
    """The share of this rank: consecutive windows, equally many on every rank but for one.

    The shape of a forward pass does not depend on the stride: plain and sliding evaluation of one
    run share a compiled graph.
    """
    num_targets = dataset.num_scored_tokens(config.seq_len)
    stride = config.stride or config.seq_len
    count = num_windows(num_targets, config.seq_len, stride)
    most_plain_rows = max(1, math.ceil(num_targets // config.seq_len / group.size))
    return Windows(
        config.seq_len,
        stride,
        num_targets,
        first=count * group.rank // group.size,
        end=count * (group.rank + 1) // group.size,
        batch_rows=min(config.batch_tokens // config.seq_len, most_plain_rows),
    )
