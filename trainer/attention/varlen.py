"""Attention through `torch.nn.attention.varlen`: FlashAttention-2 over packed documents.

Comes with PyTorch from 2.11, knows windows, and costs documents what they are long. Without
documents every row is one piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.documents import Documents, packed
from trainer.errors import BackendError


def build_varlen(device_type: str, log: Log) -> Attend:
    """The backend around the library's function."""
    from torch.nn.attention.varlen import varlen_attn

    # Grouped queries came before the argument that allows them.
    has_argument = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(
        attend_varlen, partial(varlen_attn, enable_gqa=True) if has_argument else varlen_attn
    )


def attend_varlen(
    flash: Callable[..., Any],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`; `flash` is the library's function. BackendError for types other than bfloat16
    and float16."""
    if q_BTHD.dtype not in (torch.bfloat16, torch.float16):
        raise BackendError(
            f"runtime.attention = 'varlen': it does not compute in {q_BTHD.dtype}; set "
            "runtime.dtype = bfloat16 or runtime.attention = auto"
        )
    num_rows, num_tokens = q_BTHD.shape[:2]
    if documents is None:
        max_len = num_tokens
        bounds = num_tokens * torch.arange(num_rows + 1, dtype=torch.int32, device=q_BTHD.device)
    else:
        bounds, max_len, guard = documents.pieces()
        q_BTHD = q_BTHD * guard.to(q_BTHD.dtype)
    q, k, v = (packed(x).contiguous() for x in (q_BTHD, k_BTGD, v_BTGD))
    sides = (-1 if window is None else window, 0)
    out: Tensor = flash(q, k, v, bounds, bounds, max_len, max_len, window_size=sides)
    return out.view_as(q_BTHD)


def _fault(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it runs on cuda, not on {device_type}; set runtime.attention = auto"
    return None


VARLEN = Backend("varlen", build_varlen, _fault)
