"""What a model of a given configuration consists of and costs, by arithmetic alone.

Filters ask before any worker exists, so this loads without torch. A test holds it against the real
model.
"""

from __future__ import annotations

import math

from trainer.config import ModelConfig
from trainer.config.next_token import config_of_block

Table = dict[str, tuple[int, ...]]


def parameter_table(model: ModelConfig) -> Table:
    """Every parameter of `GPT(model)` by name, in the model's own order, with its shape."""
    width = model.model_dim
    table: Table = {}
    if model.num_skips:
        skip_width = width if model.skip_kind == "channel" else 1
        table["skip_weights"] = (model.num_skips, skip_width)
        if model.gated_skips:
            table["skip_gates"] = (model.num_skips, skip_width)
    if model.backout_layer >= 0:
        table["backout"] = (1,)
    table["tok_emb.weight"] = (model.table_rows, width)
    for index in range(model.num_layers):
        table |= _under(f"blocks.{index}", _block(model, index))
    for kind in ("weights", "gates") if model.gated_skips else ("weights",):
        for index in range(model.num_recur_skips):
            table[f"recur_skip_{kind}.{index}"] = (skip_width,)
    if model.parallel == "lanes" and model.parallel_merge == "learned":
        table["lane_merge.share"] = (1,)
    if model.num_loops > 1:
        for index in range(model.num_loops * model.num_layers):
            table |= _under(f"visits.{index}", _visit(model))
    if not model.tie_embeddings:
        table["head.weight"] = (model.table_rows, width)
    return table | _joining(model) | _next_token_block(model)


def _block(model: ModelConfig, index: int) -> Table:
    width = model.model_dim
    table: Table = {} if model.num_loops > 1 else _scales(model)
    if not model.attends(index):
        table.pop("attn_scale", None)
    if model.layer_scale:
        table["layer_scale"] = (width,)
    if model.resid_lambda_init:
        table["resid_lambdas"] = (2,)
    if model.attends(index):
        table |= _under("attn", _attention(model, index))
    mlp: Table = {
        "mlp.up.weight": (model.mlp_dim, width),
        "mlp.down.weight": (width, model.mlp_dim),
    }
    if model.mlp_kind == "swiglu":
        mlp["mlp.swish.weight"] = (model.mlp_dim, width)
    table |= mlp
    has_factors = model.is_parallel(index) or model.parallel_factors == "all"
    if model.parallel == "lanes" and has_factors:
        table |= {"lanes.resid": (2,), "lanes.post": (2, 2)}
    for repeat in range(model.recur_visits - 1) if model.recurs(index) else ():
        table |= _under(f"repeats.{repeat}", _repeat(model, index, mlp))
    return table


def _next_token_block(model: ModelConfig) -> Table:
    """The extra block of multi-token prediction."""
    if not model.mtp_weight:
        return {}
    merge: Table = {"merge.weight": (model.model_dim, 2 * model.model_dim)}
    block = _under("block", _block(config_of_block(model), model.num_layers))
    return _under("mtp", merge | block)


def _repeat(model: ModelConfig, index: int, mlp: Table) -> Table:
    table: Table = {}
    if model.recur_blend != "off":
        table["blend_factors"] = (1 if model.recur_blend == "alpha" else 2,)
    names = list(_matrices(model)) if model.attends(index) else ["up", "down"]
    if model.unties_mlp(index):
        table |= mlp
        names = names[:-2]
    return table | _lora(model, names, model.recur_lora_rank)


def _scales(model: ModelConfig) -> Table:
    width = model.model_dim
    table: Table = {}
    if model.branch_scales == "channel":
        table |= {"attn_scale": (width,), "mlp_scale": (width,)}
    if model.resid_mix == "channel":
        table["resid_mix"] = (2, width)
    elif model.resid_mix == "scalar":
        table |= {"keep_factor": (1,), "embed_factor": (1,)}
    return table


def _attention(model: ModelConfig, index: int) -> Table:
    has_gain = model.num_loops == 1 and model.qk_gain == "learned"
    table: Table = {"q_gain": (model.num_heads,)} if has_gain else {}
    if model.diff_attention != "off":
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        table |= dict.fromkeys(names, (model.head_dim // 2,))
    matrices = list(_matrices(model).items())[:4]
    table |= {f"{name}.weight": (num_out, num_in) for name, (num_in, num_out) in matrices}
    if index and model.value_residual == "gated":
        table["value_residual.gate"] = (1,)
    if index and model.value_residual == "learned":
        table["value_residual.factors"] = (2,)
    if model.embeds_values(index):
        table["value_embed.scale"] = (1,)
    if model.excludes(index) and model.xsa_strength == "learned":
        table["xsa.strength"] = (model.num_heads,)
    if model.projects_values(index):
        kv_width = model.num_kv_heads * model.head_dim
        table["value_proj.proj.weight"] = (kv_width, model.model_dim)
        table["value_proj.gate.weight"] = (model.num_kv_heads, model.value_proj_gate_dim)
    table |= _under("iha", _head_mixes(model, index))
    if model.attn_gate != "off":
        is_narrow = model.attn_gate in ("window", "sparse")
        num_in = model.attn_gate_dim if is_narrow else model.model_dim
        table["gate.weight"] = (model.num_heads, num_in)
    if model.attn_gate == "biased":
        table["gate.bias"] = (model.num_heads,)
    return table


def _head_mixes(model: ModelConfig, index: int) -> Table:
    """What interleaved head attention adds to a layer."""
    heads, groups, count = model.num_heads, model.num_kv_heads, model.iha_pseudo_heads
    kind = model.iha_of(index)
    if kind == "fused":
        table: Table = {"q": (heads, heads), "k": (groups, groups), "v": (groups, groups)}
        return table | ({"out": (heads, heads)} if model.iha_fused == "qkvo" else {})
    if kind == "interleaved":
        collapse = (heads, count) if model.iha_collapse == "own" else (heads, heads * count)
        mixes = {"q": (heads, heads, count), "k": (groups, groups, count)}
        return {**mixes, "v": mixes["k"], "collapse": collapse}
    return {}


def _visit(model: ModelConfig) -> Table:
    table = _scales(model) | {"q_gain": (model.num_heads,)}
    return table | _lora(model, list(_matrices(model)), model.lora_rank)


def _lora(model: ModelConfig, names: list[str], rank: int) -> Table:
    table: Table = {}
    for name in names if rank else ():
        num_in, num_out = _matrices(model)[name]
        table[f"lora.{name}.a"] = (num_in, rank)
        table[f"lora.{name}.b"] = (rank, num_out)
    return table


def _matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices of a block."""
    width, kv_width = model.model_dim, model.num_kv_heads * model.head_dim
    return {
        "q": (width, width),
        "k": (width, kv_width),
        "v": (width, kv_width),
        "out": (width, width),
        "up": (width, model.mlp_dim),
        "down": (model.mlp_dim, width),
    }


def _joining(model: ModelConfig) -> Table:
    """What joins the embedding and the values."""
    table: Table = {}
    if model.bigram_buckets:
        table["bigram.scale"] = (1,)
        table["bigram.table.weight"] = (model.bigram_buckets, model.bigram_dim)
        if model.bigram_dim != model.model_dim:
            table["bigram.proj.weight"] = (model.model_dim, model.bigram_dim)
    if model.smear == "token":
        table["token_smear.gate"] = (model.smear_gate_dim,)
        table["token_smear.scale"] = (1,)
    if model.smear == "channel":
        table["channel_smear.gate"] = (model.model_dim,)
    if model.value_embed_dim:
        kv_width = model.num_kv_heads * model.head_dim
        table["value_embed.scale"] = (1,)
        table["value_embed.table.weight"] = (model.vocab_size, model.value_embed_dim)
        table["value_embed.proj.weight"] = (kv_width, model.value_embed_dim)
    return table


def _under(prefix: str, table: Table) -> Table:
    return {f"{prefix}.{name}": shape for name, shape in table.items()}


def count_parameters(model: ModelConfig) -> int:
    """Number of trained scalars; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in parameter_table(model).values())


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one training token, forward and backward.

    6 P + 12 C N, where P counts the weights of matrix products, each as often as it is used when
    all blocks that recur do (the head included, lookups not): two operations per weight forward,
    twice that backward. Attention: N is the sum over visits of the keys that a query meets on
    average, (T + 1) / 2 where it sees everything; each costs 2 C operations for scores and 2 C for
    values, three times for the whole step. Differential attention over whole values does it all
    twice. Where heads interleave, each pseudo-token of a token meets keys of its own; their mixes
    are products, too. Pointwise work is left out.

    Args:
        seq_len: T, tokens in a row.
    """
    num_keys = sum(
        _visits(model, layer) * _keys_of_layer(model, layer, seq_len)
        for layer in range(model.num_layers)
        if model.attends(layer)
    )
    if model.mtp_weight:
        num_keys += _keys_of_layer(config_of_block(model), model.num_layers, seq_len)
    maps = 2 if model.diff_attention == "full" else 1
    attention = 12 * model.model_dim * num_keys * maps
    return float(6 * _product_weights(model) + attention)


def _visits(model: ModelConfig, layer: int) -> float:
    visits = model.recur_visits if model.recurs(layer) else 1
    # Passes without a gradient cost their forward third.
    passes: float = model.num_passes
    if model.passes_gradient == "last":
        passes = 1 + (passes - 1) / 3
    return model.num_loops * passes * visits


def _keys_of_layer(model: ModelConfig, layer: int, seq_len: int) -> float:
    """Keys that the queries of a token meet, averaged over a row."""
    if model.iha_of(layer) != "interleaved":
        return _mean_keys(model.window_of(layer), seq_len)
    count, window = model.iha_pseudo_heads, model.pseudo_window_of(layer)
    if model.iha_mask == "block":
        return count * count * _mean_keys(window, seq_len)
    return count * _mean_keys(window, count * seq_len)


def _product_weights(model: ModelConfig) -> float:
    # The head, tied or not; the extra block goes through it, too.
    weights: float = model.table_rows * model.model_dim * (2 if model.mtp_weight else 1)
    for name, shape in parameter_table(model).items():
        if ".iha." in name:
            layer, visits = model.num_layers, 1.0
            if name.startswith("blocks."):
                layer = int(name.split(".")[1])
                visits = _visits(model, layer)
            if model.iha_of(layer) == "interleaved" and not _is_no_product(model, name):
                weights += math.prod(shape) * model.head_dim * visits
        elif ".lora." in name or (".repeats." in name and name.endswith(".weight")):
            weights += math.prod(shape)
        elif name.startswith("blocks.") and name.endswith(".weight"):
            layer = int(name.split(".")[1])
            is_untied = ".mlp." in name and model.unties_mlp(layer)
            weights += math.prod(shape) * (1 if is_untied else _visits(model, layer))
            if name.endswith(("attn.q.weight", "attn.k.weight")) and _widens(model, layer):
                weights += math.prod(shape) * (model.iha_pseudo_heads - 1) * _visits(model, layer)
        elif name.endswith("proj.weight") or name.startswith("mtp."):
            weights += math.prod(shape)
    return weights


def _widens(model: ModelConfig, layer: int) -> bool:
    """Whether a layer projects to all pseudo-heads of q and k at once."""
    return model.iha_product == "weights" and model.iha_of(layer) == "interleaved"


def _is_no_product(model: ModelConfig, name: str) -> bool:
    """Whether a mix of interleaved heads is a sum, or is part of a projection."""
    if name.endswith("collapse"):
        return model.iha_collapse == "own"
    return model.iha_product == "weights" and name.endswith(("iha.q", "iha.k"))


def _mean_keys(window: int | None, seq_len: int) -> float:
    """Keys that a query meets, itself included, averaged over a row."""
    if window is None or window + 1 >= seq_len:
        return (seq_len + 1) / 2
    growing = (window + 1) * (window + 2) / 2
    return (growing + (seq_len - window - 1) * (window + 1)) / seq_len
