"""Attention through cuDNN's kernel alone, by PyTorch's `scaled_dot_product_attention`.

The same function as `sdpa`, which prefers this kernel where it works but falls back in silence;
here full attention runs on it or not at all. Windows and documents are masks for other kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.sdpa import attend_sdpa, cudnn_fault


def build_cudnn(device_type: str, log: Log) -> Attend:
    """The backend; nothing to choose."""
    masked = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return partial(_attend, [SDPBackend.CUDNN_ATTENTION], masked)


def _attend(
    plain: list[SDPBackend],
    masked: list[SDPBackend],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    /,
    **options: Any,
) -> Tensor:
    """See `Attend`."""
    is_plain = options.get("window") is None and options.get("documents") is None
    with sdpa_kernel(plain if is_plain else masked):
        return attend_sdpa(q_BTHD, k_BTGD, v_BTGD, **options)


def _fault(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it runs on cuda, not on {device_type}; set runtime.attention = auto"
    fault = cudnn_fault()
    return fault and f"{fault}; set runtime.attention = auto"


CUDNN = Backend("cudnn", build_cudnn, _fault)
