"""Which tensor is stored how: a table, first match wins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from trainer.config import QuantizeConfig


@dataclass(frozen=True)
class StoreRule:
    """A row: tensors whose name matches `pattern` and that are small enough share a scheme."""

    pattern: str
    """Shell wildcards on the name in the state dict."""
    scheme: str
    """Key of SCHEMES."""
    max_numel: int | None = None
    """Applies to tensors of at most this many elements; None = any size."""


def store_rules(config: QuantizeConfig) -> tuple[StoreRule, ...]:
    """The challenge baseline's choice with this run's numbers.

    Control tensors steer whole layers and cost next to nothing, so they keep 32 bits.
    """
    embedding = f"int{config.embed_bits}" if config.embed_bits else config.scheme
    return (
        StoreRule("*_scale", "float32"),
        StoreRule("*resid_mix", "float32"),
        StoreRule("*q_gain", "float32"),
        StoreRule("*skip_weights", "float32"),
        StoreRule("*skip_gates", "float32"),
        StoreRule("*resid_lambdas", "float32"),
        StoreRule("*backout", "float32"),
        StoreRule("*.scale", "float32"),
        StoreRule("*_smear.gate", "float32"),
        StoreRule("*.value_residual.*", "float32"),
        StoreRule("*.lambda_??", "float32"),
        StoreRule("*", "float16", max_numel=config.keep_float_max_numel),
        StoreRule("*tok_emb.weight", embedding),
        StoreRule("*", config.scheme),
    )


def choose_scheme(name: str, shape: tuple[int, ...], config: QuantizeConfig) -> str:
    """The scheme of a tensor of real numbers, by its name and size."""
    numel = math.prod(shape)
    return next(
        rule.scheme
        for rule in store_rules(config)
        if fnmatchcase(name, rule.pattern) and (rule.max_numel is None or numel <= rule.max_numel)
    )
