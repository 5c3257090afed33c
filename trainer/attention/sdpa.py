"""Attention through `torch.nn.functional.scaled_dot_product_attention`: runs everywhere.

On cuda the library chooses among several kernels. Measured on an H200 (bf16, D = 64), cuDNN's needs
0.6 of the time of FlashAttention-2, and a whole step of golf_baseline takes 248 ms instead of 276.
But its support depends on driver, library and shape, so it is tried once and preferred only where
it gives the right numbers.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.documents import Documents

# Behind cuDNN and flash, so that windows (an explicit mask) and fp32 still find a kernel.
_FALLBACKS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ROUNDING = 0.02
"""Largest difference from fp32 that bf16 kernels show on unit normal input, with room."""


def build_sdpa(device_type: str, log: Log) -> Attend:
    """The backend for this device; on cuda with the kernels in order of preference."""
    if device_type != "cuda":
        return attend_sdpa
    kernels = [SDPBackend.FLASH_ATTENTION, *_FALLBACKS]
    fault = cudnn_fault()
    if fault is None:
        kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
    log(f"attention: sdpa prefers {kernels[0].name}" + (f" (cuDNN: {fault})" if fault else ""))
    return partial(_attend_in_order, kernels)


def attend_sdpa(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`. The library's own choice of kernel."""
    mask = _mask(q_BTHD, window, documents)
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BTGD.transpose(1, 2),
        v_BTGD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTHD.size(2) != k_BTGD.size(2),
    )
    return out_BHTD.transpose(1, 2)


def _mask(q_BTHD: Tensor, window: int | None, documents: Documents | None) -> Tensor | None:
    """[B, 1, T, T], [T, T], or None for what the library masks itself."""
    if documents is not None:
        return documents.mask(window)[:, None]
    return None if window is None else window_mask(q_BTHD.size(1), window, q_BTHD.device)


def window_mask(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """True where query row may see key column: itself and `window` tokens before, [T, T]."""
    position_T = torch.arange(num_tokens, device=device)
    distance_TT = position_T[:, None] - position_T[None, :]
    return (distance_TT >= 0) & (distance_TT <= window)


def _attend_in_order(
    kernels: list[SDPBackend],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    with sdpa_kernel(kernels, set_priority=True):
        return attend_sdpa(q_BTHD, k_BTGD, v_BTGD, window=window, documents=documents)


def cudnn_fault() -> str | None:
    """Why cuDNN's kernel is not to be used, from one small forward and backward against fp32."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 256, 4, 64), (2, 256, 2, 64), (2, 256, 2, 64)]
    inputs = [torch.randn(s, device="cuda", generator=generator) for s in shapes]
    exact = _output_and_gradients(inputs, torch.float32, SDPBackend.MATH)
    try:
        tried = _output_and_gradients(inputs, torch.bfloat16, SDPBackend.CUDNN_ATTENTION)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(tried, exact, strict=True))
    return None if worst < _ROUNDING else f"relative error {worst:.3g} against fp32"


def _output_and_gradients(
    inputs: list[Tensor], dtype: torch.dtype, kernel: SDPBackend
) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    with sdpa_kernel(kernel):
        out_BTHD = attend_sdpa(leaves[0], leaves[1], leaves[2])
        # a cotangent that differs by position: with ones, dq and dk of a softmax nearly vanish
        with warnings.catch_warnings():
            # often a process's first backward pass: its thread finds no CUDA context and says so
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            gradients = torch.autograd.grad(out_BTHD, leaves, out_BTHD.detach().cos())
    return [x.detach().float() for x in (out_BTHD, *gradients)]


SDPA = Backend("sdpa", build_sdpa, fault=lambda device_type: None)
