"""What is evaluated, and on what: the arguments that every adaptive evaluation shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import EvaluateConfig
from trainer.data.byte_table import ByteTable
from trainer.data.dataset import Dataset
from trainer.distributed import Group
from trainer.evaluate.distribution_check import check_causality, check_sums
from trainer.evaluate.scorer import LossModel, Scorer, as_asked, open_scorer
from trainer.model.gpt import GPT

SUM_ROWS, SUM_TOKENS = 64, 128
"""Shape in which sums over the vocabulary are checked: small, for there are V / rows passes."""


@dataclass(frozen=True)
class Subject:
    """A model, whose weights an adaptive evaluation changes, and its validation set."""

    model: GPT
    forward: Callable[..., Tensor]
    """The model, compiled where that is on."""
    dataset: Dataset
    byte_table: ByteTable
    micro_batch_tokens: int
    """Most tokens of one forward and backward pass of a worker."""
    group: Group

    def scorer(self, config: EvaluateConfig) -> Scorer:
        """A fresh pass over the text."""
        return open_scorer(self.dataset, self.byte_table, config, self.group)

    def check(self, forward: LossModel, config: EvaluateConfig, num_rows: int) -> None:
        """Compile the pass of [num_rows, evaluate.seq_len] that will score, and check on random
        tokens what it and the model give. Raises RuleError."""
        vocab_size, device = self.model.config.vocab_size, self.group.device
        asked = as_asked(forward, config)
        check_causality(asked, vocab_size, num_rows, config.seq_len, device)
        short = min(config.seq_len, SUM_TOKENS)
        check_sums(self.model, vocab_size, SUM_ROWS, short, device)


@contextmanager
def gradients_of(model: nn.Module, trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, only these parameters of the model ask for gradients. A compiled graph is guarded by
    who asks, so priming must happen inside as well."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(trained)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)


def random_rows(
    vocab_size: int, num_rows: int, seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(x_BT, y_BT) for priming: no validation token may be seen outside the clock."""
    generator = torch.Generator().manual_seed(0)
    x_BT, y_BT = torch.randint(vocab_size, (2, num_rows, seq_len), generator=generator).to(device)
    return x_BT, y_BT
