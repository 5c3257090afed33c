"""Whether a kernel can run on this machine, and what is taken where none was asked for by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from trainer.errors import BackendError

Log = Callable[[str], None]

MEASURED_BEST = {"mlp_kernel": "compiled", "loss_kernel": "compiled", "iha_kernel": "compiled"}
"""What "auto" takes on a GPU that can run the kernels. An entry changes when benchmarks/kernels.py
or benchmarks/iha_layer.py, and whole steps, have shown that another wins."""


def choose_kernel(setting: str, name: str, device_type: str, capability: int, log: Log) -> str:
    """The kernel that `runtime.<setting>` = `name` means here; never "auto".

    Args:
        capability: lowest major compute capability of the GPU that the kernels need.
        log: told once what "auto" took, and why.
    Raises:
        BackendError: a kernel was asked for by name and cannot run here; says what to do.
    """
    if name == "compiled":
        return name
    fault = kernel_fault(device_type, capability)
    if name == "auto":
        taken = "compiled" if fault else MEASURED_BEST[setting]
        log(f"{setting}: auto takes {taken}" + (f", because {fault}" if fault else ""))
        return taken
    if fault is not None:
        raise BackendError(f'runtime.{setting} = "{name}": {fault}; set runtime.{setting} = auto')
    return name


def kernel_fault(device_type: str, capability: int) -> str | None:
    """Why Triton kernels cannot run on this device; None when they can."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return f"its kernels need a GPU, and this runs on {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability()
    if major < capability:
        return (
            f"its kernels need compute capability {capability}.0, and this GPU has {major}.{minor}"
        )
    return None
