"""Which tensor is stored how: a table, first match wins."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from trainer.config import QuantizeConfig

FLAT_NUMEL = 128
"""Control tensors of fewer elements stay floats under quantize.control_bits = 8."""


@dataclass(frozen=True)
class StoreRule:
    """A row: tensors whose name matches `pattern` and that are small enough share a scheme."""

    pattern: str
    """Shell wildcards on the name in the state dict."""
    scheme: str
    """Key of SCHEMES."""
    max_numel: int | None = None
    """Applies to tensors of at most this many elements; None = any size."""


def kept_rules(config: QuantizeConfig) -> tuple[StoreRule, ...]:
    """What stays a float: the challenge baseline's choice with this run's numbers.

    Control tensors steer whole layers and cost next to nothing, so they keep 32 bits.
    """
    return (
        StoreRule("*_scale", "float32"),
        StoreRule("*resid_mix", "float32"),
        StoreRule("*q_gain", "float32"),
        StoreRule("*skip_weights", "float32"),
        StoreRule("*skip_gates", "float32"),
        StoreRule("*resid_lambdas", "float32"),
        StoreRule("*_factor", "float32"),
        StoreRule("*.xsa.strength", "float32"),
        StoreRule("*backout", "float32"),
        StoreRule("*recur_skip_*", "float32"),
        StoreRule("*blend_factors", "float32"),
        StoreRule("*.lanes.*", "float32"),
        StoreRule("*lane_merge.share", "float32"),
        StoreRule("*.gate.bias", "float32"),
        StoreRule("*.scale", "float32"),
        StoreRule("*_smear.gate", "float32"),
        StoreRule("*.value_residual.*", "float32"),
        StoreRule("*.lambda_??", "float32"),
        StoreRule("*.iha.*", "float32"),
        *([StoreRule("*gate*", f"int{config.gate_bits}")] if config.gate_bits else []),
        StoreRule("*", "float16", max_numel=config.keep_float_max_numel),
    )


def choose_scheme(
    name: str, shape: tuple[int, ...], config: QuantizeConfig, num_layers: int
) -> str:
    """The scheme of a tensor of real numbers, by its name and size: that of the first rule that
    matches, else codes of as many bits as the settings give to its kind."""
    numel = math.prod(shape)
    kept = (
        rule.scheme
        for rule in kept_rules(config)
        if fnmatchcase(name, rule.pattern) and (rule.max_numel is None or numel <= rule.max_numel)
    )
    scheme = next(kept, f"int{config.bits_of(name, num_layers)}")
    if scheme == "float32" and config.control_bits == 8 and numel >= FLAT_NUMEL:
        return "flat8"
    if config.scale_bits == 8 and re.fullmatch(r"int[4-8]", scheme):
        return f"{scheme}+u8"
    return scheme


def count_layers(names: Iterable[str]) -> int:
    """Blocks of the model whose state dict has these names."""
    layers = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return max((int(layer[1]) + 1 for layer in layers if layer), default=0)
