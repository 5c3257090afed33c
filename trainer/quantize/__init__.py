"""Trained weights as small integers and back; SCHEMES is the table a new quantiser joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.config.quantize import takes_low_rank
from trainer.errors import ArtifactError
from trainer.quantize.awq import choose_groups
from trainer.quantize.gptq import encode_gptq
from trainer.quantize.low_rank import LowRank
from trainer.quantize.per_row import HIGH_LEVELS, PerRow, as_rows, rows_and_columns
from trainer.quantize.rules import choose_scheme, count_layers
from trainer.quantize.schemes import SCHEMES, find_scheme, scheme_named
from trainer.quantize.state import ArraySpec, QuantizedState, QuantizedTensor, Scheme

__all__ = [
    "SCHEMES",
    "ArraySpec",
    "QuantizedState",
    "QuantizedTensor",
    "Scheme",
    "coded_names",
    "corrected",
    "dequantize",
    "find_scheme",
    "quantize",
    "scheme_named",
    "untied",
]


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
    kept, aliases = untied(state)
    num_layers = count_layers(state)
    schemes = {name: _scheme_of(name, kept[name], config, num_layers) for name in kept}
    known = dict(hessians or {}) if config.method == "gptq" else {}
    starts = _precise_columns(kept, schemes, config, known)
    for name, of_tensor in starts.items():
        schemes[name] += f"+hi{len(of_tensor)}x{config.awq_group_size}"
    tensors = {}
    for name, tensor in kept.items():
        own = config.for_tensor(name)
        scheme = scheme_named(schemes[name])
        arrays = (
            _encode_codes(name, tensor, scheme, own, known.get(name), starts.get(name, ()), log)
            if isinstance(scheme, PerRow)
            else scheme.encode(tensor, own)
        )
        tensors[name] = QuantizedTensor(schemes[name], tuple(tensor.shape), arrays)
    return QuantizedState(_with_factors(tensors, kept, config, known, log), aliases)


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, detached, and the other names of tied ones."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored_as: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        first = stored_as.setdefault(_memory(name, tensor), name)
        if first == name:
            kept[name] = tensor.detach()
        else:
            aliases[name] = first
    return kept, aliases


def _precise_columns(
    kept: Mapping[str, Tensor],
    schemes: Mapping[str, str],
    config: QuantizeConfig,
    hessians: Mapping[str, Tensor],
) -> dict[str, tuple[int, ...]]:
    """AWQ-lite's groups, among the matrices of fewer than 8 bits."""
    if not config.awq_groups:
        return {}
    eligible = {
        name: tensor
        for name, tensor in kept.items()
        if isinstance(scheme := scheme_named(schemes[name]), PerRow) and scheme.levels < HIGH_LEVELS
    }
    return choose_groups(eligible, hessians, config.awq_groups, config.awq_group_size)


def _encode_codes(
    name: str,
    tensor: Tensor,
    scheme: PerRow,
    config: QuantizeConfig,
    hessian_CC: Tensor | None,
    starts: tuple[int, ...],
    log: Callable[[str], None],
) -> dict[str, np.ndarray]:
    if hessian_CC is None:
        return scheme.encode(tensor, config)
    solved = encode_gptq(tensor, scheme, config, hessian_CC, starts)
    if solved is None:
        log(f"gptq: {name} is rounded, its Hessian stays singular; give more calibration_tokens")
        return scheme.encode(tensor, config, hessian_CC.diagonal(), starts)
    return solved


def _with_factors(
    tensors: dict[str, QuantizedTensor],
    kept: Mapping[str, Tensor],
    config: QuantizeConfig,
    hessians: Mapping[str, Tensor],
    log: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """The tensors, with low-rank factors for those that rounding cost most."""
    errors: dict[str, float] = {}
    for name, stored in tensors.items():
        scheme = scheme_named(stored.scheme)
        if isinstance(scheme, PerRow) and takes_low_rank(config, name):
            decoded = torch.from_numpy(scheme.decode(stored.arrays, stored.shape))
            errors[name] = float((kept[name].cpu().float() - decoded).double().norm())
    worst = sorted(errors, key=lambda name: -errors[name])
    for name in worst[: config.low_rank_top_k or len(worst)]:
        better = corrected(tensors[name], kept[name], config, hessians.get(name))
        if better is None:
            log(f"low_rank: {name} stays without factors, they would not lower its error")
        else:
            tensors[name] = better
    return tensors


def corrected(
    stored: QuantizedTensor, tensor: Tensor, config: QuantizeConfig, hessian_CC: Tensor | None
) -> QuantizedTensor | None:
    """The tensor with factors, unless they make it worse: its outputs where inputs are known,
    its weights otherwise."""
    base = scheme_named(stored.scheme)
    assert isinstance(base, PerRow)
    rank = min(config.low_rank_rank, *rows_and_columns(stored.shape))
    group = config.low_rank_group if config.low_rank == "asymmetric" else 0
    scheme = LowRank(base, rank, group)
    arrays = scheme.extended(tensor, dict(stored.arrays))
    losses = []
    for coded, parts in ((base, stored.arrays), (scheme, arrays)):
        decoded = torch.from_numpy(coded.decode(parts, stored.shape))
        error_RC = (as_rows(tensor).cpu() - as_rows(decoded)).double()
        weighted_RC = error_RC if hessian_CC is None else error_RC @ hessian_CC.cpu().double()
        losses.append(float((weighted_RC * error_RC).sum()))
    if losses[1] >= losses[0]:
        return None
    suffix = f"+lr{rank}g{group}" if group else f"+lr{rank}"
    return QuantizedTensor(stored.scheme + suffix, stored.shape, arrays)


def coded_names(state: Mapping[str, Tensor], config: QuantizeConfig) -> list[str]:
    """The tensors of real numbers that become codes, the others staying floats."""
    num_layers = count_layers(state)
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point()
        and isinstance(
            scheme_named(choose_scheme(name, tuple(tensor.shape), config, num_layers)), PerRow
        )
    ]


def dequantize(quantized: QuantizedState) -> dict[str, Tensor]:
    """The weights to score with, fp32 on the CPU (integers int64), under every name of the model.

    Deterministic: each rank that decodes the same artifact computes with the same bits.
    """
    weights = {
        name: torch.from_numpy(scheme_named(stored.scheme).decode(stored.arrays, stored.shape))
        for name, stored in quantized.tensors.items()
    }
    return weights | {name: weights[target] for name, target in quantized.aliases.items()}


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
