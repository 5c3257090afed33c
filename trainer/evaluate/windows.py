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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.dataset import Dataset
from trainer.data.shards import Tokens
from trainer.distributed import Group


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

    def rows(self, padded: Tokens, batch: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """(x_BT, y_BT, number of rows that hold a window) of the `batch`-th forward pass."""
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.seq_len + 1)
        first, end = self._span(batch)
        span = torch.zeros(self.batch_rows, self.seq_len + 1, dtype=torch.int64)
        own = windows[first * self.stride : (end - 1) * self.stride + 1 : self.stride]
        span[: end - first] = torch.from_numpy(own.astype(np.int64))
        span = span.to(device)
        return span[:, :-1].contiguous(), span[:, 1:].contiguous(), end - first

    def targets(self, batch: int, device: torch.device) -> Tensor:
        """[rows that hold a window, T] index of each target; N and more beyond the text."""
        first, end = self._span(batch)
        starts_B = torch.arange(first, end, device=device) * self.stride
        return starts_B[:, None] + torch.arange(self.seq_len, device=device)

    def counted(self, batch: int, device: torch.device) -> Tensor:
        """[rows that hold a window, T] bool: this window is the one that scores this target."""
        first, end = self._span(batch)
        is_first_B = torch.arange(first, end, device=device) == 0
        is_new_T = torch.arange(self.seq_len, device=device) >= self.seq_len - self.stride
        inside_BT = self.targets(batch, device) < self.num_targets
        return (is_first_B[:, None] | is_new_T) & inside_BT

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
