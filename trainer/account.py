"""What a model of a given configuration consists of and costs, by arithmetic alone.

Filters ask before any worker exists, so this loads without torch. A test holds it against the real
model.
"""

from __future__ import annotations

import math

from trainer.config import ModelConfig


def parameter_table(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of `GPT(model)` by name, in the model's own order, with its shape."""
    width, kv_width = model.model_dim, model.num_kv_heads * model.head_dim
    num_skips = model.num_layers // 2
    table: dict[str, tuple[int, ...]] = {}
    if num_skips:
        table["skip_weights"] = (num_skips, width)
    table["tok_emb.weight"] = (model.vocab_size, width)
    for index in range(model.num_layers):
        block = f"blocks.{index}"
        table[f"{block}.attn_scale"] = (width,)
        table[f"{block}.mlp_scale"] = (width,)
        table[f"{block}.resid_mix"] = (2, width)
        table[f"{block}.attn.q_gain"] = (model.num_heads,)
        table[f"{block}.attn.q.weight"] = (width, width)
        table[f"{block}.attn.k.weight"] = (kv_width, width)
        table[f"{block}.attn.v.weight"] = (kv_width, width)
        table[f"{block}.attn.out.weight"] = (width, width)
        table[f"{block}.mlp.up.weight"] = (model.mlp_dim, width)
        table[f"{block}.mlp.down.weight"] = (width, model.mlp_dim)
    if not model.tie_embeddings:
        table["head.weight"] = (model.vocab_size, width)
    return table


def count_parameters(model: ModelConfig) -> int:
    """Number of trained scalars; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_table(model).values())


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one training token, forward and backward.

    6 P + 6 L C (T + 1), where P counts the weights of matrix products (the head included, the
    lookup not): two operations per weight forward, twice that backward. Attention: a query meets
    (T + 1) / 2 keys on average, with 2 C operations for its scores and 2 C for its values, L times,
    and again three times that for the whole step. Pointwise work is left out.

    Args:
        seq_len: T, tokens in a row.
    """
    table = parameter_table(model)
    matrices = sum(
        math.prod(shape)
        for name, shape in table.items()
        if name.startswith("blocks.") and name.endswith(".weight")
    )
    head = model.vocab_size * model.model_dim
    attention = 6 * model.num_layers * model.model_dim * (seq_len + 1)
    return float(6 * (matrices + head) + attention)
