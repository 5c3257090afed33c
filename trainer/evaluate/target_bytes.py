"""Bytes of text of each target in an evaluation, from the tokenizer's table or the side-car."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset

CountBytes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(token before each target, targets, index of each target), all of one shape -> bytes, int64.
Target i is validation token i + 1; an index beyond the text gives some number."""


def target_bytes(dataset: Dataset, table: ByteTable, device: torch.device) -> CountBytes:
    """How this data set's bytes are counted. Raises DataError when it has a side-car that does not
    belong to its tokens."""
    side_car = dataset.read_val_bytes()
    if side_car is None:
        table = table.to(device)
        return lambda previous, targets, _: table.count(previous, targets)
    # int32: torch has few operations on uint16.
    counts_N = torch.from_numpy(side_car[1:].astype(np.int32)).to(device)
    last = len(counts_N) - 1
    return lambda _, __, indices: counts_N[indices.clamp(max=last)].long()
