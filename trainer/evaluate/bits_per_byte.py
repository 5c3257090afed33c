"""val_bpb exactly as the challenge computes it: every validation token once, in rows of seq_len.

Scored are the targets of the floor((N - 1) / T) whole rows that N validation tokens make. Losses
are summed in fp64 and bytes counted from the tokenizer's table, over all ranks:

    val_loss = sum of nats / tokens        val_bpb = (val_loss / ln 2) * (tokens / bytes)

Rows see nothing before their own start. Every forward pass has one shape, so that a compiled graph
serves them all: the last batch is filled with rows that are not counted.

Shapes: B rows of one forward pass, T evaluate.seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all) after each batch is launched; must not block."""


class LossModel(Protocol):
    """What evaluation needs of a model; GPT and its compiled form have it."""

    def __call__(
        self, tokens_BT: Tensor, targets_BT: Tensor, reduction: Literal["mean", "none"]
    ) -> Tensor:
        """[B, T] fp32 nats of each target for reduction "none"."""
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


@dataclass(frozen=True)
class _Plan:
    """The rows of one rank and the shape in which they go through the model."""

    first_row: int
    end_row: int
    batch_rows: int

    @property
    def num_batches(self) -> int:
        return math.ceil((self.end_row - self.first_row) / self.batch_rows)


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
    tokens = torch.from_numpy(dataset.read_val())
    plan = _plan(dataset, config, group)
    table = byte_table.to(group.device)
    sums = torch.zeros(3, dtype=torch.float64, device=group.device)
    with torch.inference_mode():
        for batch in range(plan.num_batches):
            x_BT, y_BT, num_rows = _batch(tokens, plan, batch, config.seq_len, group.device)
            loss_BT = model(x_BT, y_BT, reduction="none")[:num_rows]
            num_bytes = table.count(x_BT[:num_rows], y_BT[:num_rows]).sum()
            sums[0] += loss_BT.double().sum()
            sums[1] += num_rows * config.seq_len
            sums[2] += num_bytes
            if progress is not None:
                progress(batch + 1, plan.num_batches)
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
    batch_rows = _plan(dataset, config, group).batch_rows
    plan = _Plan(first_row=0, end_row=batch_rows, batch_rows=batch_rows)
    generator = torch.Generator().manual_seed(0)
    num_tokens = batch_rows * config.seq_len + 1
    tokens = torch.randint(dataset.vocab_size, (num_tokens,), generator=generator)
    with torch.inference_mode():
        # The batch must be made in here: a compiled graph is guarded by the kind of its inputs.
        x_BT, y_BT, _ = _batch(tokens, plan, 0, config.seq_len, group.device)
        model(x_BT, y_BT, reduction="none")


def _plan(dataset: Dataset, config: EvaluateConfig, group: Group) -> _Plan:
    rows = dataset.num_scored_tokens(config.seq_len) // config.seq_len
    most_rows = max(1, math.ceil(rows / group.size))
    return _Plan(
        first_row=rows * group.rank // group.size,
        end_row=rows * (group.rank + 1) // group.size,
        batch_rows=min(config.batch_tokens // config.seq_len, most_rows),
    )


def _batch(
    tokens: Tensor, plan: _Plan, batch: int, seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """(x_BT, y_BT, number of rows that count) of a rank's `batch`-th forward pass."""
    first = plan.first_row + batch * plan.batch_rows
    num_rows = min(plan.batch_rows, plan.end_row - first)
    span = torch.zeros(plan.batch_rows * seq_len + 1, dtype=torch.int64)
    span[: num_rows * seq_len + 1] = tokens[first * seq_len : (first + num_rows) * seq_len + 1]
    span = span.to(device)
    return span[:-1].view(-1, seq_len), span[1:].view(-1, seq_len), num_rows
