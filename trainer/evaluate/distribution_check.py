"""Does a model give, at every position, one normalised distribution that no later token changes?

The score's first two rules. They are about the function, not about a text, so they are tried on
random tokens, outside every clock, in the shape in which the model will be run: other tokens from a
position on must leave the losses before it alone, and the probabilities of all V tokens, asked for
one by one as targets, must sum to 1. The second also finds a model that looks at its targets.

Shapes: B rows of one forward pass, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.errors import RuleError
from trainer.evaluate.scorer import LossModel

CAUSAL_NATS = 1e-3
"""Largest move of a loss when only later tokens change. Rows do not mix, so sound models show 0;
kernels that split their sums by shape and content of the batch could show rounding."""
SUM_ERROR = 0.02
"""Largest distance of a sum of V probabilities from 1; bf16 logits round each by up to 0.4 %."""


def check_distribution(
    model: LossModel, vocab_size: int, num_rows: int, seq_len: int, device: torch.device
) -> None:
    """Two passes of [num_rows, seq_len], and V / num_rows more for the sums. Call it in the mode
    (inference, gradients) in which the model will run. Raises RuleError with what was found."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(vocab_size, shape, generator=generator).to(device)

    x_BT, y_BT = draw(num_rows, seq_len), draw(num_rows, seq_len)
    _check_causality(model, x_BT, y_BT, draw(num_rows, seq_len))
    _check_sums(model, x_BT[:1].repeat(num_rows, 1), vocab_size)


def _check_causality(model: LossModel, x_BT: Tensor, y_BT: Tensor, other_BT: Tensor) -> None:
    """A different cut in every row. Inputs and targets are drawn apart: the input after a position
    is its target, and a model that peeks there must not be excused by the target's change."""
    num_rows, width = x_BT.shape
    cuts_B1 = (width - 1 - torch.arange(num_rows, device=x_BT.device) % (width - 1))[:, None]
    is_later_BT = torch.arange(width, device=x_BT.device) >= cuts_B1
    before_BT = model(x_BT, y_BT, reduction="none")
    changed_x_BT = torch.where(is_later_BT, other_BT, x_BT)
    after_BT = model(changed_x_BT, torch.where(is_later_BT, other_BT, y_BT), reduction="none")
    worst = float(torch.where(is_later_BT, 0.0, (after_BT - before_BT).abs()).max())
    if not worst <= CAUSAL_NATS:
        raise RuleError(
            f"the loss of a token moved by {worst:.3g} nats when only later tokens changed: the "
            "model is not causal"
        )


def _check_sums(model: LossModel, x_BT: Tensor, vocab_size: int) -> None:
    total_T = torch.zeros(x_BT.size(1), dtype=torch.float64, device=x_BT.device)
    for first in range(0, vocab_size, x_BT.size(0)):
        candidates_B = torch.arange(first, first + x_BT.size(0), device=x_BT.device)
        targets_BT = candidates_B.clamp(max=vocab_size - 1)[:, None].expand_as(x_BT).contiguous()
        p_BT = torch.exp(-model(x_BT, targets_BT, reduction="none").double())
        total_T += torch.where((candidates_B < vocab_size)[:, None], p_BT, 0.0).sum(0)
    worst = float((total_T - 1).abs().max())
    if not worst <= SUM_ERROR:
        raise RuleError(
            f"the probabilities of all {vocab_size} tokens sum to 1 {worst:+.3g} at some position: "
            "what is scored is no distribution"
        )
