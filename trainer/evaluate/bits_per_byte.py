"""val_bpb exactly as the challenge computes it: every validation token once, in windows of seq_len.

Scored are the targets of the floor((M - 1) / T) whole rows that M validation tokens make. Losses
are summed in fp64 and bytes counted from the tokenizer's table, or the byte side-car of CaseOps,
over all ranks:

    val_loss = sum of nats / tokens        val_bpb = (val_loss / ln 2) * (tokens / bytes)

Windows see nothing before their own start. They lie side by side, or overlap (evaluate.stride,
trainer/evaluate/windows.py); the scored targets are the same. Every forward pass has one shape,
with or without a stride, so that a compiled graph serves them all: the last batch is filled with
rows that are not counted.

Shapes: B rows of one forward pass, T evaluate.seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.ngram_cache import NgramCache
from trainer.evaluate.target_bytes import target_bytes
from trainer.evaluate.tilt import Tilt, as_scored
from trainer.evaluate.windows import Windows, plan_windows

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all) after each batch is launched; must not block."""


class LossModel(Protocol):
    """What evaluation needs of a model; GPT and its compiled form have it."""

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        """[B, T] fp32 nats of each target for reduction "none"; for targets of shape [B, T, K], K
        tokens for each place, [B, T, K]."""
        ...


@dataclass(frozen=True)
class EvalResult:
    """The score of a model on a validation set."""

    val_loss: float
    """Nats per token."""
    val_bpb: float
    """Bits per byte of text."""
    num_tokens: int
    num_bytes: int


def evaluate(
    model: LossModel,
    dataset: Dataset,
    byte_table: ByteTable,
    config: EvaluateConfig,
    group: Group,
    progress: Progress | None = None,
) -> EvalResult:
    """Score a model on the whole validation set. Runs on every rank together; all get the result.

    The sums are fp64, so the number of ranks and the batch size change the result only by what the
    model's own arithmetic does with another batch shape. Raises DataError when the set is smaller
    than one row.
    """
    dataset.check_scored_tokens(config.seq_len, expected=0)
    windows = plan_windows(dataset, config, group)
    tokens = windows.padded(dataset.read_val())
    tilt = None
    if config.tilt_beta > 0:
        tilt = Tilt.of(tokens[: windows.num_targets + 1], config, group)
    cache = NgramCache.of(tokens, windows.num_targets, config, group.device)
    count_bytes = target_bytes(dataset, byte_table, group.device)
    sums = torch.zeros(3, dtype=torch.float64, device=group.device)
    with torch.inference_mode():
        for batch in range(windows.num_batches):
            x_BT, y_BT, num_rows = windows.rows(tokens, batch, group.device)
            counted_BT = windows.counted(batch, group.device)
            indices_BT = windows.targets(batch, group.device)
            if tilt is None:
                loss_BT = model(x_BT, y_BT, reduction="none")[:num_rows]
            else:
                _, loss_BT = tilt.score(model, x_BT, y_BT, indices_BT)
            if cache is not None:
                loss_BT = cache.mix(loss_BT, indices_BT)
            bytes_BT = count_bytes(x_BT[:num_rows], y_BT[:num_rows], indices_BT)
            sums[0] += torch.where(counted_BT, loss_BT.double(), 0.0).sum()
            sums[1] += counted_BT.sum()
            sums[2] += torch.where(counted_BT, bytes_BT, 0).sum()
            if progress is not None:
                progress(batch + 1, windows.num_batches)
        group.all_reduce_sum_(sums)
    nats, num_tokens, num_bytes_all = sums.tolist()
    val_loss = nats / num_tokens
    return EvalResult(
        val_loss=val_loss,
        val_bpb=val_loss / math.log(2) * (num_tokens / num_bytes_all),
        num_tokens=int(num_tokens),
        num_bytes=int(num_bytes_all),
    )


def prime(model: LossModel, dataset: Dataset, config: EvaluateConfig, group: Group) -> None:
    """Run one forward pass just as `evaluate` does, so that its graph is compiled before a clock
    runs. The tokens are random: no validation token may be seen outside the clock."""
    batch_rows = plan_windows(dataset, config, group).batch_rows
    seq_len = config.seq_len
    windows = Windows(seq_len, seq_len, batch_rows * seq_len, 0, batch_rows, batch_rows)
    generator = np.random.default_rng(0)
    tokens = generator.integers(dataset.vocab_size, size=batch_rows * seq_len + 1, dtype=np.uint16)
    with torch.inference_mode():
        # The batch must be made in here: a compiled graph is guarded by the kind of its inputs.
        x_BT, y_BT, _ = windows.rows(windows.padded(tokens), 0, group.device)
        model(x_BT, y_BT, reduction="none")
        if config.tilt_beta > 0:
            model(x_BT, as_scored(y_BT, config), reduction="none")
