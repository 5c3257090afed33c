"""Attention through FlashAttention-4 (wheel flash-attn-4), whose kernels compile at first call.

On an H200 (bf16, D = 64) forward and backward take 1.69 ms where cuDNN needs 1.71 at rows of 2048,
2.93 and 3.38 at 6144; with a window of 512 1.41, where compiled FlexAttention needs 1.74. Relative
error against fp32: 2.0e-3 forward, 2.7e-3 backward.

The library does not trace, so both directions are custom operators around its two inner functions.
Their annotations are read at run time: no postponed annotations in this file.

Legend beside that of `Attend`: N tokens of all rows, P pieces. Dense rows are [B, T, H, D]; packed
pieces are [N, H, D] with [P + 1] int32 boundaries, as FlashAttention's "varlen" takes them.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.documents import Documents, packed
from trainer.errors import BackendError

_REMEDY = (
    "install flash-attn-4 with what it needs, `pip install '.[gpu]'` in the project's folder, or "
    "set runtime.attention = auto"
)
_NO_WINDOW = -1


def build_flash4(device_type: str, log: Log) -> Attend:
    """The backend; nothing to choose."""
    return attend_flash4


def attend_flash4(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`. BackendError for types other than bfloat16 and float16."""
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        raise BackendError(
            f"runtime.attention = 'flash4': it does not compute in {q_BTHD.dtype}; set "
            "runtime.dtype = bfloat16 or runtime.attention = auto"
        )
    left = _NO_WINDOW if window is None else window
    if documents is None:
        out_BTHD: Tensor = flash4(q_BTHD, k_BTGD, v_BTGD, None, 0, left)[0]
        return out_BTHD
    bounds, max_len, guard = documents.pieces()
    q_NHD, k_NGD, v_NGD = (packed(x) for x in (q_BTHD * guard.to(q_BTHD.dtype), k_BTGD, v_BTGD))
    out_NHD: Tensor = flash4(q_NHD, k_NGD, v_NGD, bounds, max_len, left)[0]
    return out_NHD.view_as(q_BTHD)


@torch.library.custom_op("caddie::flash4", mutates_args=())
def flash4(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, max_len: int, window: int
) -> tuple[Tensor, Tensor]:
    """Output as q and log-sum-exp of the scores, fp32 [B, H, T]; packed [N, H, D] and [H, N].

    Args:
        bounds: [P + 1] int32, where each packed piece begins, and N; None = dense rows.
        max_len: longest piece; ignored for dense rows.
        window: tokens before itself that a token sees; -1 = all.
    """
    out, lse = _library()._flash_attn_fwd(
        q, k, v, return_lse=True, **_options(bounds, max_len, window)
    )[:2]
    return out, lse


@flash4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, max_len: int, window: int
) -> tuple[Tensor, Tensor]:
    lse_shape = (q.size(0), q.size(2), q.size(1)) if bounds is None else (q.size(1), q.size(0))
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.custom_op("caddie::flash4_backward", mutates_args=())
def flash4_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    max_len: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; arguments as `flash4` took and gave them."""
    # q, k, v are often slices of one product; a gradient laid out like them would not be dense.
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _library()._flash_attn_bwd(
        q, k, v, out, d_out.contiguous(), lse, dq=dq, dk=dk, dv=dv,
        **_options(bounds, max_len, window),
    )  # fmt: skip
    return dq, dk, dv


@flash4_backward.register_fake
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    max_len: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.max_len, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, bounds = ctx.saved_tensors
    gradients = flash4_backward(d_out, *saved, bounds, ctx.max_len, ctx.window)
    return (*gradients, None, None, None)


flash4.register_autograd(_backward, setup_context=_setup_context)


def _options(bounds: Tensor | None, max_len: int, window: int) -> dict[str, Any]:
    """Keyword arguments that both inner functions take."""
    options: dict[str, Any] = {"causal": True}
    if window != _NO_WINDOW:
        options["window_size_left"] = window
    if bounds is not None:
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), bounds)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), max_len)
    return options


@functools.cache
def _library() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _fault(device_type: str) -> str | None:
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"it runs on cuda, not on {device_type}; set runtime.attention = auto"
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return (
            f"its backward pass needs compute capability 9.0, and this GPU has {major}.{minor}; "
            "set runtime.attention = auto"
        )
    try:
        _library()
    except Exception as error:  # what it is built on fails in many ways
        return f"it cannot be imported ({error}); {_REMEDY}"
    return None


FLASH4 = Backend("flash4", build_flash4, _fault)
