"""Trained weights as small integers and back; SCHEMES is the table a new quantiser joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.errors import ArtifactError
from trainer.quantize.gptq import encode_gptq
from trainer.quantize.kept import Kept
from trainer.quantize.per_row import PerRow
from trainer.quantize.rules import choose_scheme, count_layers
from trainer.quantize.state import ArraySpec, QuantizedState, QuantizedTensor, Scheme

__all__ = [
    "SCHEMES",
    "ArraySpec",
    "QuantizedState",
    "QuantizedTensor",
    "Scheme",
    "coded_names",
    "dequantize",
    "quantize",
]

SCHEMES: dict[str, Scheme] = {
    "int8": PerRow(levels=127),
    "int6": PerRow(levels=31),
    "int5": PerRow(levels=15),
    "float16": Kept("<f2", "float32"),
    "float32": Kept("<f4", "float32"),
    "int64": Kept("<i8", "int64"),
}


def quantize(
    state: Mapping[str, Tensor],
    config: QuantizeConfig,
    hessians: Mapping[str, Tensor] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> QuantizedState:
    """Store every tensor of a state dict as the rules say. Runs on rank 0, where the tensors are.

    Tied tensors (the very same memory) are stored once.

    Args:
        hessians: for method "gptq", by name, as `collect_hessians` returns them; tensors without
            one are rounded.
        log: is told of every tensor that GPTQ could not solve.

    Raises: ArtifactError that names a tensor with numbers that are not finite, or of a type that
        no scheme stores.
    """
    tensors: dict[str, QuantizedTensor] = {}
    aliases: dict[str, str] = {}
    stored_as: dict[tuple[object, ...], str] = {}
    num_layers = count_layers(state)
    for name, tensor in state.items():
        first = stored_as.setdefault(_memory(name, tensor), name)
        if first != name:
            aliases[name] = first
            continue
        detached = tensor.detach()
        scheme = _scheme_of(name, detached, config, num_layers)
        hessian = (hessians or {}).get(name) if config.method == "gptq" else None
        arrays = _encode(name, detached, SCHEMES[scheme], config, hessian, log)
        tensors[name] = QuantizedTensor(scheme, tuple(detached.shape), arrays)
    return QuantizedState(tensors, aliases)


def coded_names(state: Mapping[str, Tensor], config: QuantizeConfig) -> list[str]:
    """The tensors of real numbers that become codes, the others staying floats."""
    num_layers = count_layers(state)
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point()
        and isinstance(
            SCHEMES[choose_scheme(name, tuple(tensor.shape), config, num_layers)], PerRow
        )
    ]


def dequantize(quantized: QuantizedState) -> dict[str, Tensor]:
    """The weights to score with, fp32 on the CPU (integers int64), under every name of the model.

    Deterministic: each rank that decodes the same artifact computes with the same bits.
    """
    weights = {
        name: torch.from_numpy(SCHEMES[stored.scheme].decode(stored.arrays, stored.shape))
        for name, stored in quantized.tensors.items()
    }
    return weights | {name: weights[target] for name, target in quantized.aliases.items()}


def _encode(
    name: str,
    tensor: Tensor,
    scheme: Scheme,
    config: QuantizeConfig,
    hessian_CC: Tensor | None,
    log: Callable[[str], None],
) -> dict[str, np.ndarray]:
    if hessian_CC is None or not isinstance(scheme, PerRow):
        return scheme.encode(tensor, config)
    solved = encode_gptq(tensor, scheme, config, hessian_CC)
    if solved is None:
        log(f"gptq: {name} is rounded, its Hessian stays singular; give more calibration_tokens")
    return solved or scheme.encode(tensor, config)


def _memory(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Equal for tied tensors only; empty tensors share an address without being tied."""
    if tensor.numel() == 0:
        return (name,)
    layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.device, tensor.data_ptr(), *layout)


def _scheme_of(name: str, tensor: Tensor, config: QuantizeConfig, num_layers: int) -> str:
    if tensor.is_complex():
        raise ArtifactError(f"{name}: no scheme stores {tensor.dtype}; store its real parts")
    if not tensor.is_floating_point():
        return "int64"
    if not torch.isfinite(tensor).all():
        wrong = int((~torch.isfinite(tensor)).sum())
        raise ArtifactError(
            f"{name}: {wrong:,} of {tensor.numel():,} weights are not finite, so the model cannot "
            "be packed; training diverged, lower the learning rates"
        )
    scheme = choose_scheme(name, tuple(tensor.shape), config, num_layers)
    if scheme == "float16" and tensor.numel() and tensor.abs().max() > torch.finfo(torch.half).max:
        return "float32"
    return scheme
