"""SGD over rows of text that is already scored: what chunked and phased test-time training share.

Shapes: B rows of one forward pass, T tokens of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.config import EvaluateConfig
from trainer.distributed import Group
from trainer.evaluate.subject import random_rows

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def trained_parameters(model: nn.Module, config: EvaluateConfig) -> list[nn.Parameter]:
    """What SGD changes: all but the frozen first blocks, or the MLPs of the last ones, which begin
    at block int(L (1 - ttt_last_fraction)) (E2E-TTT as in parameter-golf #1894)."""
    named = dict(model.named_parameters())
    block_of = {name: int(match[1]) for name in named if (match := _BLOCK.search(name))}
    first = config.ttt_freeze_blocks
    if config.ttt_part == "all":
        return [value for name, value in named.items() if block_of.get(name, first) >= first]
    num_layers = 1 + max(block_of.values())
    first = max(first, int(num_layers * (1 - config.ttt_last_fraction)))
    return [named[name] for name in block_of if ".mlp." in name and block_of[name] >= first]


def cosine(place: int, count: int) -> float:
    """Factor on the learning rate of the place-th of `count` chunks: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * place / max(1, count - 1)))


class RowSgd:
    """SGD with momentum. A step is the mean over the rows of all ranks; it runs on every rank
    together, each with its share of the rows, and leaves the same weights everywhere.

    Args:
        forward: (x_BT, y_BT) -> nats [B, T].
        trained: parameters that change; gradients are asked for nowhere else.
        micro_batch_tokens: most tokens of one forward and backward pass of a rank.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        trained: Sequence[nn.Parameter],
        config: EvaluateConfig,
        micro_batch_tokens: int,
        group: Group,
    ) -> None:
        self._forward = forward
        self._trained = list(trained)
        self._seq_len = config.seq_len
        self._clip_norm = config.ttt_clip_norm
        self._step_rows = min(config.ttt_batch_rows, config.ttt_chunk_tokens // config.seq_len)
        own_rows = math.ceil(self._step_rows / group.size)
        self._micro_rows = min(own_rows, max(1, micro_batch_tokens // config.seq_len))
        self._group = group
        self._optimizer = torch.optim.SGD(self._trained, lr=0.0, momentum=config.ttt_momentum)

    def prime(self, vocab_size: int) -> None:
        """Compile the pass, forward and backward, on random tokens; changes nothing."""
        shape = (self._micro_rows, self._seq_len)
        torch.autograd.backward(
            self._forward(*random_rows(vocab_size, *shape, self._group.device)).sum()
        )
        self._optimizer.zero_grad(set_to_none=True)

    def train(self, text: Tensor, lr: float, epochs: int) -> None:
        """Passes over the whole rows in a text of int64 tokens [n], in their order."""
        num_rows = (len(text) - 1) // self._seq_len
        if num_rows == 0:
            return
        num_tokens = num_rows * self._seq_len
        text = text.to(self._group.device)
        x_NT = text[:num_tokens].view(num_rows, self._seq_len)
        y_NT = text[1 : num_tokens + 1].view(num_rows, self._seq_len)
        for settings in self._optimizer.param_groups:
            settings["lr"] = lr
        for _ in range(epochs):
            for first in range(0, num_rows, self._step_rows):
                step = slice(first, first + self._step_rows)
                self._step(x_NT[step], y_NT[step])

    def _step(self, x_NT: Tensor, y_NT: Tensor) -> None:
        rank, size, count = self._group.rank, self._group.size, len(x_NT)
        first, end = count * rank // size, count * (rank + 1) // size
        for start in range(first, end, self._micro_rows):
            own = slice(start, min(start + self._micro_rows, end))
            x_BT, y_BT = self._filled(x_NT[own]), self._filled(y_NT[own])
            nats_BT = self._forward(x_BT, y_BT)[: own.stop - start]
            # The mean over ranks below makes this the mean over all tokens of the step.
            torch.autograd.backward(nats_BT.sum() * (size / x_NT.numel()))
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._group.all_reduce_mean_([p.grad for p in self._trained if p.grad is not None])
        if self._clip_norm:
            nn.utils.clip_grad_norm_(self._trained, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _filled(self, rows: Tensor) -> Tensor:
        """The rows and zeros up to the one shape that was compiled."""
        return nn.functional.pad(rows, (0, 0, 0, self._micro_rows - len(rows)))
