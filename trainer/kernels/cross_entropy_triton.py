"""The Triton kernels of trainer/kernels/cross_entropy.py: one program a row, one pass over it.

With z = s tanh(x / s) = 2 s p - s, p = sigmoid(2 x / s), the slope dz/dx is 4 p (1 - p).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 4096
"""Logits of a row that a program holds at once."""


def forward(logits: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, fp32."""
    num_rows, vocab = logits.shape
    loss, lse = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    block = _block(vocab)
    _forward_kernel[(num_rows,)](
        logits, targets, loss, lse, logits.stride(0), vocab, cap,
        BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return loss, lse


def backward(d_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    """Gradient of the raw logits, in their type and layout."""
    num_rows, vocab = logits.shape
    d_logits = torch.empty_like(logits)
    block = _block(vocab)
    _backward_kernel[(num_rows,)](
        d_loss, logits, targets, lse, d_logits, logits.stride(0), d_logits.stride(0), vocab, cap,
        BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return d_logits


def _block(vocab: int) -> int:
    return min(LARGEST_BLOCK, triton.next_power_of_2(vocab))


def _num_warps(block: int) -> int:
    return max(1, min(8, block // 512))


@triton.jit
def _forward_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, stride, vocab, cap, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum; they meet once, at the end of the row.
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        x = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        z = 2 * cap * tl.sigmoid(2 * x / cap) - cap
        z = tl.where(inside, z, -float("inf"))
        above = tl.maximum(highest, z)
        # a lane that has seen nothing yet would compute inf - inf
        safe = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp(highest - safe) + tl.exp(z - safe)
        highest = above
    peak = tl.max(highest, axis=0)
    lse = peak + tl.log(tl.sum(total * tl.exp(highest - peak), axis=0))
    x = tl.load(logits_ptr + target).to(tl.float32)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, lse - (2 * cap * tl.sigmoid(2 * x / cap) - cap))


@triton.jit
def _backward_kernel(
    d_loss_ptr, logits_ptr, targets_ptr, lse_ptr, d_logits_ptr, stride, d_stride, vocab, cap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    d_logits_ptr += row * d_stride
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    d_loss = tl.load(d_loss_ptr + row).to(tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        p = tl.sigmoid(2 * x / cap)
        d_z = tl.exp(2 * cap * p - cap - lse) - tl.where(columns == target, 1.0, 0.0)
        d_x = d_z * d_loss * 4 * p * (1 - p)
        tl.store(d_logits_ptr + columns, d_x.to(d_logits_ptr.dtype.element_ty), mask=inside)
