"""Test-time training on text that is not scored yet, as #675 had it. ILLEGAL on the golf tracks:
see trainer/legality.py. Useless as well, by its author's measurement; here to replay it.

Shapes: B rows of one forward pass, T evaluate.seq_len.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import EvaluateConfig
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.bits_per_byte import LossModel
from trainer.evaluate.windows import plan_windows


def train_on_validation(
    model: LossModel,
    parameters: Iterable[nn.Parameter],
    dataset: Dataset,
    config: EvaluateConfig,
    micro_batch_tokens: int,
    group: Group,
) -> None:
    """naive_ttt_epochs passes of SGD over the plain rows of the validation set, in order; changes
    the parameters in place. Runs on every rank together, each with its share of the rows; a step
    is the mean over one forward pass of every rank.

    Args:
        micro_batch_tokens: most tokens of one forward pass.
    """
    windows = plan_windows(dataset, config.plain(), group)
    batch_rows = min(windows.batch_rows, max(1, micro_batch_tokens // config.seq_len))
    windows = dataclasses.replace(windows, batch_rows=batch_rows)
    tokens = windows.padded(dataset.read_val())
    trained = list(parameters)
    optimizer = torch.optim.SGD(trained, config.naive_ttt_lr, config.naive_ttt_momentum)
    num_steps = int(group.max_float(windows.num_batches))
    for step in range(config.naive_ttt_epochs * num_steps):
        optimizer.zero_grad(set_to_none=True)
        count = torch.zeros((), device=group.device)
        if step % num_steps < windows.num_batches:
            x_BT, y_BT, num_rows = windows.rows(tokens, step % num_steps, group.device)
            loss_BT = model(x_BT, y_BT, reduction="none")[:num_rows]
            torch.autograd.backward(loss_BT.sum())
            count += loss_BT.numel()
        _average(trained, count, group)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _average(parameters: list[nn.Parameter], count: Tensor, group: Group) -> None:
    """Make each gradient of a sum the gradient of the mean over all ranks' tokens."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    group.all_reduce_mean_([*gradients, count])
    torch._foreach_div_(gradients, count)
