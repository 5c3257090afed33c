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

from collections.abc import Callable

import numpy as np
import torch

from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.scorer import EvalResult, LossModel, as_asked, open_scorer
from trainer.evaluate.windows import Windows, plan_windows

__all__ = ["EvalResult", "LossModel", "Progress", "evaluate", "prime"]

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all) after each batch is launched; must not block."""


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
    scorer = open_scorer(dataset, byte_table, config, group)
    with torch.inference_mode():
        for batch in range(windows.num_batches):
            scorer.score(model, windows.batch(batch), windows.batch_rows)
            if progress is not None:
                progress(batch + 1, windows.num_batches)
        return scorer.result()


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
        if config.tilt_beta > 0:  # diagnostics are plain, the score is not
            as_asked(model, config)(x_BT, y_BT, reduction="none")
