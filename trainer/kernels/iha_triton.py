"""The Triton kernels of trainer/kernels/iha.py: a program takes some tokens, one after another.

The heads of a token are the two halves of small products, [N, N] times [N, D / 2] for each
pseudo-head, on tensor cores, N padded to a power of two. Pairs that turn together are then the same
place of both halves, and a norm is a sum along rows. A program is a single warp, because a tile of
N <= 16 rows is one warp's, and because nothing then waits for other warps.

The gradient of the mix is summed by each program over its tokens, then over programs, in a fixed
order: repeated runs give the same bits.
"""
# ruff: noqa: RUF005 - Triton's language joins tuples by +, and has no unpacking
# mypy: disable-error-code="assignment"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is laid out on the GPU."""

    tokens: int
    """That a program takes one after another."""
    num_warps: int
    stages: int
    """Tokens whose loads are under way at once."""


FORWARD = Launch(tokens=4, num_warps=1, stages=2)
BACKWARD = Launch(tokens=8, num_warps=1, stages=2)
SMALLEST = 16
"""Least extent of a factor of tl.dot."""


def forward(x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """Pseudo-tokens, [B, S, N, D], in the type of x."""
    x = _with_whole_rows(x)
    num_rows, num_tokens, num_heads, width = x.shape
    out = x.new_empty(num_rows, num_tokens * (len(mix) // num_heads), num_heads, width)
    _forward_kernel[_grid(x, FORWARD)](
        x, mix.contiguous(), x if cos is None else cos, x if sin is None else sin, out,
        x.stride(1), num_rows * num_tokens, num_tokens, eps,
        **_extents(x, mix, FORWARD), TURNS=cos is not None,
    )  # fmt: skip
    return out


def backward(
    d_out: Tensor, x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, [B, T, N, D] in its type, and of the mix, fp32."""
    x = _with_whole_rows(x)
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    num_rows, num_tokens, *_ = x.shape
    d_x = x.new_empty(x.shape)
    grid = _grid(x, BACKWARD)
    d_mixes = x.new_empty(*grid, *mix.shape, dtype=torch.float32)
    _backward_kernel[grid](
        d_out, x, mix.contiguous(), x if cos is None else cos, x if sin is None else sin, d_x,
        d_mixes, *d_out.stride()[:3], x.stride(1), num_rows * num_tokens, num_tokens, eps,
        **_extents(x, mix, BACKWARD), TURNS=cos is not None,
    )  # fmt: skip
    return d_x, d_mixes.sum(0)


def _with_whole_rows(x: Tensor) -> Tensor:
    """x as it is where each token's heads lie side by side and tokens at equal distances."""
    num_rows, num_tokens, _, width = x.shape
    evenly = num_rows == 1 or x.stride(0) == num_tokens * x.stride(1)
    return x if evenly and x.stride()[2:] == (width, 1) else x.contiguous()


def _grid(x: Tensor, launch: Launch) -> tuple[int]:
    return (triton.cdiv(x.size(0) * x.size(1), launch.tokens),)


def _extents(x: Tensor, mix: Tensor, launch: Launch) -> dict[str, int]:
    num_heads, width = x.shape[2:]
    return {
        "HEADS": num_heads,
        "COUNT": len(mix) // num_heads,
        "HALF": width // 2,
        "HEADS_BLOCK": _block(num_heads),
        "HALF_BLOCK": _block(width // 2),
        "TOKENS": launch.tokens,
        "STAGES": launch.stages,
        "num_warps": launch.num_warps,
    }


def _block(extent: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(extent))


@triton.jit
def _forward_kernel(
    x_ptr, mix_ptr, cos_ptr, sin_ptr, out_ptr, x_stride, num_all, num_tokens, eps,
    HEADS: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, HEADS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    in_half = half < HALF
    in_token = (heads < HEADS)[:, None] & in_half[None, :]
    at_token = heads[:, None] * (2 * HALF) + half[None, :]
    in_mix = (heads < HEADS)[:, None] & (heads < HEADS)[None, :]
    at_mix = heads[:, None] * HEADS + heads[None, :]
    mixes = ()
    for p in tl.static_range(COUNT):
        mix = tl.load(mix_ptr + p * HEADS * HEADS + at_mix, mask=in_mix, other=0.0)
        mixes = mixes + (mix.to(x_ptr.dtype.element_ty),)
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    for step in tl.range(0, TOKENS, num_stages=STAGES):
        token = first_token + step
        is_there = token < num_all
        x_at = x_ptr + token * x_stride + at_token
        x_first = tl.load(x_at, mask=in_token & is_there, other=0.0)
        x_second = tl.load(x_at + HALF, mask=in_token & is_there, other=0.0)
        for p in tl.static_range(COUNT):
            first = tl.dot(mixes[p], x_first, input_precision="ieee")
            second = tl.dot(mixes[p], x_second, input_precision="ieee")
            if TURNS:
                table_at = ((token % num_tokens) * COUNT + p) * HALF + half
                cos = tl.load(cos_ptr + table_at, mask=in_half & is_there, other=0.0)[None, :]
                sin = tl.load(sin_ptr + table_at, mask=in_half & is_there, other=0.0)[None, :]
                square = tl.sum(first * first + second * second, axis=1)
                inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
                turned = (first * cos + second * sin) * inverse
                second = (second * cos - first * sin) * inverse
                first = turned
            out_at = out_ptr + (token * COUNT + p) * (2 * HALF * HEADS) + at_token
            tl.store(out_at, first.to(out_ptr.dtype.element_ty), mask=in_token & is_there)
            tl.store(out_at + HALF, second.to(out_ptr.dtype.element_ty), mask=in_token & is_there)


@triton.jit
def _backward_kernel(
    d_out_ptr, x_ptr, mix_ptr, cos_ptr, sin_ptr, d_x_ptr, d_mixes_ptr,
    d_row_stride, d_token_stride, d_head_stride, x_stride, num_all, num_tokens, eps,
    HEADS: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    heads = tl.arange(0, HEADS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    in_half = half < HALF
    in_token = (heads < HEADS)[:, None] & in_half[None, :]
    at_token = heads[:, None] * (2 * HALF) + half[None, :]
    in_mix = (heads < HEADS)[:, None] & (heads < HEADS)[None, :]
    at_mix = heads[:, None] * HEADS + heads[None, :]
    mixes = ()
    d_mixes = ()
    for p in tl.static_range(COUNT):
        mix = tl.load(mix_ptr + p * HEADS * HEADS + at_mix, mask=in_mix, other=0.0)
        mixes = mixes + (mix.to(dtype),)
        d_mixes = d_mixes + (tl.zeros([HEADS_BLOCK, HEADS_BLOCK], tl.float32),)
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    for step in tl.range(0, TOKENS, num_stages=STAGES):
        token = first_token + step
        is_there = token < num_all
        in_this = in_token & is_there
        x_at = x_ptr + token * x_stride + at_token
        x_first = tl.load(x_at, mask=in_this, other=0.0)
        x_second = tl.load(x_at + HALF, mask=in_this, other=0.0)
        d_x_first = tl.zeros([HEADS_BLOCK, HALF_BLOCK], tl.float32)
        d_x_second = tl.zeros([HEADS_BLOCK, HALF_BLOCK], tl.float32)
        summed = ()
        for p in tl.static_range(COUNT):
            place = (token % num_tokens) * COUNT + p
            d_at = (token // num_tokens) * d_row_stride + place * d_token_stride
            d_at = d_out_ptr + d_at + heads[:, None] * d_head_stride + half[None, :]
            d_first = tl.load(d_at, mask=in_this, other=0.0)
            d_second = tl.load(d_at + HALF, mask=in_this, other=0.0)
            if TURNS:
                first = tl.dot(mixes[p], x_first, input_precision="ieee")
                second = tl.dot(mixes[p], x_second, input_precision="ieee")
                cos = tl.load(cos_ptr + place * HALF + half, mask=in_half & is_there, other=0.0)
                sin = tl.load(sin_ptr + place * HALF + half, mask=in_half & is_there, other=0.0)
                cos = cos[None, :]
                sin = sin[None, :]
                square = tl.sum(first * first + second * second, axis=1)
                inverse = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
                # The gradient turned back, where it meets z itself.
                wide_first = d_first.to(tl.float32)
                wide_second = d_second.to(tl.float32)
                back_first = wide_first * cos - wide_second * sin
                back_second = wide_first * sin + wide_second * cos
                along = tl.sum(back_first * first + back_second * second, axis=1)[:, None]
                along = along * inverse * inverse / (2 * HALF)
                d_first = (inverse * (back_first - first * along)).to(dtype)
                d_second = (inverse * (back_second - second * along)).to(dtype)
            back = tl.trans(mixes[p])
            d_x_first = tl.dot(back, d_first, d_x_first, input_precision="ieee")
            d_x_second = tl.dot(back, d_second, d_x_second, input_precision="ieee")
            d_mix = tl.dot(d_first, tl.trans(x_first), d_mixes[p], input_precision="ieee")
            d_mix = tl.dot(d_second, tl.trans(x_second), d_mix, input_precision="ieee")
            summed = summed + (d_mix,)
        d_mixes = summed
        d_x_at = d_x_ptr + token * (2 * HALF * HEADS) + at_token
        tl.store(d_x_at, d_x_first.to(dtype), mask=in_this)
        tl.store(d_x_at + HALF, d_x_second.to(dtype), mask=in_this)
    d_mixes_ptr += tl.program_id(0) * (COUNT * HEADS * HEADS)
    for p in tl.static_range(COUNT):
        tl.store(d_mixes_ptr + p * HEADS * HEADS + at_mix, d_mixes[p], mask=in_mix)
