"""Pseudo-heads of interleaved head attention as one operator: mix, turn and normalise.

    z[t, p, h] = sum_m A[m, h, p] x[t, m]      read once, written where attention reads
    n = turned(z) / sqrt(mean(z^2) + EPS)      queries and keys only; values are z

The plain code moves z through memory twice more, forward, and three times more, backward. Kept for
the backward pass is x alone, which the projection has to keep anyway; z is computed again. With
r = 1 / sqrt(mean(z^2) + EPS), u = turned(z) and dn the gradient of n:

    dz = turned back(r (dn - u r^2 mean(dn u)))      dx[m] = sum A[m, h, p] dz[p, h]

A rotation keeps the norm, so the order of the two, `model.qk_norm`, makes no difference here.

Annotations are read at run time: none are postponed in this file. Legend: B rows, T tokens, P
pseudo-heads, S = T P pseudo-tokens, N heads, R = P N, D head width, F = D / 2 rotary frequencies.
"""

from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
"""As trainer/model/norm.py."""


def interleave(
    x_BTND: Tensor, mix_RN: Tensor, tables: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Pseudo-heads as pseudo-tokens, [B, S, N, D], p fastest among them, in the type of x.

    Args:
        mix_RN: a row for each (p, target), used in the type of x.
        tables: cos and sin of every pseudo-token, [S, F]; None = neither turned nor normalised.
    """
    cos_SF, sin_SF = (table.contiguous() for table in tables) if tables else (None, None)
    out: Tensor = interleave_op(x_BTND, mix_RN, cos_SF, sin_SF)
    return out


@torch.library.custom_op("caddie::interleave", mutates_args=())
def interleave_op(x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """See `interleave`."""
    if x.is_cuda:
        from trainer.kernels.iha_triton import forward

        return forward(x, mix, cos, sin, EPS)
    mixed = _mixed(x, mix)
    if cos is not None and sin is not None:
        mixed = _turned(mixed, cos, sin) * _inverse_rms(mixed)
    return mixed.to(x.dtype)


@interleave_op.register_fake
def _(x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    num_rows, num_tokens, num_heads, width = x.shape
    return x.new_empty(num_rows, num_tokens * (len(mix) // num_heads), num_heads, width)


@torch.library.custom_op("caddie::interleave_backward", mutates_args=())
def interleave_backward(
    d_out: Tensor, x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, in its type, and of the mix, fp32 or more."""
    if x.is_cuda:
        from trainer.kernels.iha_triton import backward

        return backward(d_out, x, mix, cos, sin, EPS)
    wide = _at_least_fp32(x)
    d_mixed = d_out.to(wide)
    if cos is not None and sin is not None:
        mixed = _mixed(x, mix)
        inverse, turned = _inverse_rms(mixed), _turned(mixed, cos, sin)
        along = (d_mixed * turned).mean(-1, keepdim=True)
        d_mixed = _turned(inverse * (d_mixed - turned * inverse.square() * along), cos, -sin)
    d_BTRD = d_mixed.reshape(*x.shape[:2], len(mix), -1).to(x.dtype).to(wide)
    d_x = mix.T.to(x.dtype).to(wide) @ d_BTRD
    return d_x.to(x.dtype), torch.einsum("btrd,btnd->rn", d_BTRD, x.to(wide))


@interleave_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, mix: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mix.new_empty(mix.shape, dtype=_at_least_fp32(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
    d_x, d_mix = interleave_backward(d_out, *ctx.saved_tensors)
    return d_x, d_mix.to(ctx.saved_tensors[1].dtype), None, None


interleave_op.register_autograd(_backward, setup_context=_setup_context)


def _mixed(x_BTND: Tensor, mix_RN: Tensor) -> Tensor:
    """z of every pseudo-token, [B, S, N, D]."""
    wide = _at_least_fp32(x_BTND)
    mixed_BTRD = mix_RN.to(x_BTND.dtype).to(wide) @ x_BTND.to(wide)
    return mixed_BTRD.view(x_BTND.size(0), -1, *x_BTND.shape[2:])


def _turned(x_BSND: Tensor, cos_SF: Tensor, sin_SF: Tensor) -> Tensor:
    """As rotate in trainer/model/rotary.py, where every dim turns."""
    first, second = x_BSND.chunk(2, dim=-1)
    cos, sin = cos_SF[:, None], sin_SF[:, None]
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
