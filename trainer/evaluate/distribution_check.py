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
    """Both checks in one shape. Raises RuleError with what was found."""
    check_causality(model, vocab_size, num_rows, seq_len, device)
    check_sums(model, vocab_size, num_rows, seq_len, device)


def check_causality(
    model: LossModel, vocab_size: int, num_rows: int, seq_len: int, device: torch.device
) -> None:
    """Two passes of [num_rows, seq_len]; seq_len is 2 or more. A different cut in every row. Inputs
    and targets are drawn apart: the input after a position is its target, and a model that peeks
    there must not be excused by the target's change."""
    shape = (num_rows, seq_len)
    x_BT, y_BT, other_BT = _draw(vocab_size, (3, *shape), device).unbind(0)
    cuts_B1 = (seq_len - 1 - torch.arange(num_rows, device=device) % (seq_len - 1))[:, None]
    is_later_BT = torch.arange(seq_len, device=device) >= cuts_B1
    before_BT = model(x_BT, y_BT, reduction="none")
    changed_x_BT = torch.where(is_later_BT, other_BT, x_BT)
    after_BT = model(changed_x_BT, torch.where(is_later_BT, other_BT, y_BT), reduction="none")
    moved_BT = (after_BT - before_BT).detach().abs()
    worst = float(torch.where(is_later_BT, 0.0, moved_BT).max())
    if not worst <= CAUSAL_NATS:
        raise RuleError(
            f"the loss of a token moved by {worst:.3g} nats when only later tokens changed: the "
            "model is not causal"
        )


def check_sums(
    model: LossModel, vocab_size: int, num_rows: int, seq_len: int, device: torch.device
) -> None:
    """V / num_rows passes of [num_rows, seq_len]."""
    x_BT = _draw(vocab_size, (1, seq_len), device).repeat(num_rows, 1)
    total_T = torch.zeros(seq_len, dtype=torch.float64, device=device)
    for first in range(0, vocab_size, num_rows):
        candidates_B = torch.arange(first, first + num_rows, device=device)
        targets_BT = candidates_B.clamp(max=vocab_size - 1)[:, None].expand_as(x_BT).contiguous()
        p_BT = torch.exp(-model(x_BT, targets_BT, reduction="none").detach().double())
        total_T += torch.where((candidates_B < vocab_size)[:, None], p_BT, 0.0).sum(0)
    worst = float((total_T - 1).abs().max())
    if not worst <= SUM_ERROR:
        raise RuleError(
            f"the probabilities of all {vocab_size} tokens sum to 1 {worst:+.3g} at some position: "
            "what is scored is no distribution"
        )


def _draw(vocab_size: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, shape, generator=generator).to(device)
