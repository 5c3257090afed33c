"""The MLP, down(a(up(x))) with a = leaky_relu^2, and RMSNorm + matrix, as operators.

Forward, the activation (and, where x is not yet normalised, the factor 1 / rms of its row) is
applied to the tile of the product while it is in registers. Backward, so is the product of the
incoming gradient with a's slope. Variants [parameter-golf]:

    keep = "input"      the pre-activation is kept; backward computes the slope again (#1530)
    keep = "slope"      the slope is kept; backward is one multiplication (#1072, #1450, seed v5)

With n = c r x, r = 1 / sqrt(mean(x^2) + EPS) and dn the gradient of n:

    dx = c r (dn - x r^2 mean(dn x))

The first published version multiplied dn by r once more; that is not copied. Products in bf16
differ from the plain code by rounding: n is never rounded where the norm is fused.

Annotations are read at run time: none are postponed in this file. Legend: M rows, C width of the
model, H hidden width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.precision import at_least_fp32

EPS = torch.finfo(torch.float32).eps
"""As trainer/model/norm.py."""


def fused_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    slope: float,
    keep_slope: bool,
    norm_scale: float = 0.0,
) -> Tensor:
    """down(a(up(x))) for x [..., C], w_up [H, C], w_down [C, H] of one type.

    Args:
        slope: of the leaky ReLU; 0 = squared ReLU.
        norm_scale: c of the norm that comes first; 0 = x is normalised already.
    """
    out: Tensor = mlp_op(
        x.flatten(0, -2).contiguous(), w_up, w_down, slope, keep_slope, norm_scale
    )[0]
    return out.view_as(x)


def norm_linear(x: Tensor, weight: Tensor, norm_scale: float = 1.0) -> Tensor:
    """rms_norm(x) norm_scale weight^T for x [..., C], weight [H, C], of one type."""
    out: Tensor = norm_linear_op(x.flatten(0, -2).contiguous(), weight, norm_scale)[0]
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("caddie::inverse_rms", mutates_args=())
def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + EPS) of each row, [M], fp32 or more."""
    if x.is_cuda:
        from trainer.kernels.mlp_triton import inverse_rms as in_triton

        return in_triton(x, EPS)
    return torch.rsqrt(x.to(at_least_fp32(x)).square().mean(1) + EPS)


@inverse_rms.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.size(0), dtype=at_least_fp32(x))


@torch.library.custom_op("caddie::mlp", mutates_args=())
def mlp_op(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float, keep_slope: bool, norm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [M, C]; what the backward pass needs: activation [M, H], its kept input or slope
    [M, H], and r [M] (empty without a norm)."""
    inverse = inverse_rms(x) if norm_scale else x.new_empty(0, dtype=at_least_fp32(x))
    row_scale = inverse * norm_scale if norm_scale else None
    if x.is_cuda:
        from trainer.kernels.mlp_triton import up_and_activate

        activated, kept = up_and_activate(x, w_up, row_scale, slope, keep_slope)
    else:
        activated, kept = _up_and_activate(x, w_up, row_scale, slope, keep_slope)
    return F.linear(activated, w_down), activated, kept, inverse


@mlp_op.register_fake
def _(
    x: Tensor, w_up: Tensor, w_down: Tensor, slope: float, keep_slope: bool, norm_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = x.new_empty(x.size(0), w_up.size(0))
    inverse = x.new_empty(x.size(0) if norm_scale else 0, dtype=at_least_fp32(x))
    return x.new_empty(x.size(0), w_down.size(0)), hidden, torch.empty_like(hidden), inverse


@torch.library.custom_op("caddie::mlp_d_pre", mutates_args=())
def mlp_d_pre(
    d_out: Tensor, w_down: Tensor, kept: Tensor, slope: float, keep_slope: bool
) -> Tensor:
    """Gradient of the pre-activation, (d_out w_down) a'(pre), [M, H]."""
    if d_out.is_cuda:
        from trainer.kernels.mlp_triton import d_pre

        return d_pre(d_out, w_down, kept, slope, keep_slope)
    return (d_out @ w_down) * (kept if keep_slope else _slope_of(kept, slope))


@mlp_d_pre.register_fake
def _(d_out: Tensor, w_down: Tensor, kept: Tensor, slope: float, keep_slope: bool) -> Tensor:
    return torch.empty_like(kept)


def _setup_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *factors, ctx.slope, ctx.keep_slope, ctx.norm_scale = inputs
    ctx.save_for_backward(*factors, *output[1:])


def _mlp_backward(ctx: Any, d_out: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    x, w_up, w_down, activated, kept, inverse = ctx.saved_tensors
    d_out = d_out.contiguous()
    d_pre = mlp_d_pre(d_out, w_down, kept, ctx.slope, ctx.keep_slope)
    d_x, d_up = _normed_backward(d_pre, x, w_up, inverse, ctx.norm_scale)
    return d_x, d_up, d_out.T @ activated, None, None, None


mlp_op.register_autograd(_mlp_backward, setup_context=_setup_mlp)


@torch.library.custom_op("caddie::norm_linear", mutates_args=())
def norm_linear_op(x: Tensor, weight: Tensor, norm_scale: float) -> tuple[Tensor, Tensor]:
    """Output [M, H] and r [M]."""
    inverse = inverse_rms(x)
    if x.is_cuda:
        from trainer.kernels.mlp_triton import scaled_product

        return scaled_product(x, weight, inverse * norm_scale), inverse
    scaled = F.linear(x, weight).to(inverse.dtype) * (inverse * norm_scale)[:, None]
    return scaled.to(x.dtype), inverse


@norm_linear_op.register_fake
def _(x: Tensor, weight: Tensor, norm_scale: float) -> tuple[Tensor, Tensor]:
    inverse = x.new_empty(x.size(0), dtype=at_least_fp32(x))
    return x.new_empty(x.size(0), weight.size(0)), inverse


def _setup_norm_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.norm_scale = inputs
    ctx.save_for_backward(x, weight, output[1])


def _norm_linear_backward(ctx: Any, d_out: Tensor, d_inverse: Tensor) -> tuple[Any, ...]:
    x, weight, inverse = ctx.saved_tensors
    return (*_normed_backward(d_out, x, weight, inverse, ctx.norm_scale), None)


norm_linear_op.register_autograd(_norm_linear_backward, setup_context=_setup_norm_linear)


def _normed_backward(
    d_pre: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, norm_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight for d_pre, the gradient of n weight^T."""
    d_n = d_pre @ weight
    if not norm_scale:
        return d_n, d_pre.T @ x
    wide = at_least_fp32(x)
    r, x_wide, d_wide = inverse[:, None], x.to(wide), d_n.to(wide)
    along = (d_wide * x_wide).mean(1, keepdim=True)
    d_x = norm_scale * r * (d_wide - x_wide * r.square() * along)
    n = (norm_scale * r * x_wide).to(x.dtype)
    return d_x.to(x.dtype), d_pre.T @ n


def _up_and_activate(
    x: Tensor, w_up: Tensor, row_scale: Tensor | None, slope: float, keep_slope: bool
) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, w_up)
    if row_scale is not None:
        pre = (pre.to(row_scale.dtype) * row_scale[:, None]).to(x.dtype)
    return F.leaky_relu(pre, slope).square(), _slope_of(pre, slope) if keep_slope else pre


def _slope_of(pre: Tensor, slope: float) -> Tensor:
    """Of leaky_relu(pre)^2."""
    return torch.where(pre > 0, 2 * pre, 2 * slope**2 * pre)
