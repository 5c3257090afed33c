"""Cross-entropy of softcapped logits as one operator: the capped logits never exist in memory.

Per row x of raw logits: z = s tanh(x / s), loss = log(sum(exp(z))) - z[target], in fp32 (or more)
whatever the type of x. Kept for the backward pass is one number a row, the log-sum-exp; there
dx = (softmax(z) - onehot) g (1 - (z / s)^2), with z computed again. In training only: scores come
from the plain code. Source: parameter-golf #1787.

Annotations are read at run time: none are postponed in this file. Legend: N rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.precision import at_least_fp32


def softcapped_cross_entropy(logits_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """Loss of each row in nats, [N], fp32 or more.

    Args:
        logits_NV: raw, before the cap; any float type, any V.
        targets_N: int64.
    """
    loss_N: Tensor = softcapped_ce(logits_NV, targets_N, cap)[0]
    return loss_N


@torch.library.custom_op("caddie::softcapped_ce", mutates_args=())
def softcapped_ce(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, [N]."""
    if logits.is_cuda:
        from trainer.kernels.cross_entropy_triton import forward

        return forward(logits, targets, cap)
    capped = _capped(logits, cap)
    lse = capped.logsumexp(1)
    return lse - capped.gather(1, targets[:, None])[:, 0], lse


@softcapped_ce.register_fake
def _(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    rows = logits.new_empty(logits.size(0), dtype=at_least_fp32(logits))
    return rows, torch.empty_like(rows)


@torch.library.custom_op("caddie::softcapped_ce_backward", mutates_args=())
def softcapped_ce_backward(
    d_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float
) -> Tensor:
    """Gradient of the raw logits, in their type."""
    if logits.is_cuda:
        from trainer.kernels.cross_entropy_triton import backward

        return backward(d_loss, logits, targets, lse, cap)
    capped = _capped(logits, cap)
    d_capped = (capped - lse[:, None]).exp()
    d_capped[torch.arange(len(targets), device=targets.device), targets] -= 1
    return (d_capped * d_loss[:, None] * (1 - (capped / cap) ** 2)).to(logits.dtype)


@softcapped_ce_backward.register_fake
def _(d_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ctx: Any, d_loss: Tensor, d_lse: Tensor) -> tuple[Tensor, None, None]:
    return softcapped_ce_backward(d_loss.contiguous(), *ctx.saved_tensors, ctx.cap), None, None


softcapped_ce.register_autograd(_backward, setup_context=_setup_context)


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits.to(at_least_fp32(logits)) / cap)
