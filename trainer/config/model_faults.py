"""Which settings of the model do not fit together: each fault with dotted path, value and remedy.

Apart from the settings themselves, because they are many. Loads without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.layer_pattern import select_layers

if TYPE_CHECKING:
    from trainer.config.model import ModelConfig


def faults_of_layers(model: ModelConfig) -> list[str]:
    faults = []
    for switch, name, pattern in (
        (model.window, "window", model.window_layers),
        (model.value_embed_dim, "value_embed_dim", model.value_embed_layers),
    ):
        owner = "window" if name == "window" else "value_embed"
        if bool(switch) != bool(pattern):
            faults.append(
                f"model.{name} = {switch} and model.{owner}_layers = {pattern!r}: one is "
                "nothing without the other; set both, or neither"
            )
        try:
            select_layers(pattern, model.num_layers)
        except ValueError as error:
            faults.append(f"model.{owner}_layers = {pattern!r}: {error}")
    for name in (
        "recur_untied_mlp",
        "no_attention_layers",
        "value_proj_layers",
        "key_offset_layers",
    ):
        try:
            select_layers(getattr(model, name), model.num_layers)
        except ValueError as error:
            faults.append(f"model.{name} = {getattr(model, name)!r}: {error}")
    if model.backout_layer > max(-1, model.num_layers - 2):
        faults.append(
            f"model.backout_layer = {model.backout_layer} is no layer before the last, whose "
            f"output would only be scaled; choose from 0 to {model.num_layers - 2}, or -1 for "
            "none"
        )
    if model.xsa_last_n > model.num_layers:
        faults.append(
            f"model.xsa_last_n = {model.xsa_last_n} is above model.num_layers = "
            f"{model.num_layers}; lower it"
        )
    return faults


def faults_of_techniques(model: ModelConfig) -> list[str]:
    faults = []
    width = model.rotary_width
    if model.diff_attention != "off" and model.head_dim % 4:
        faults.append(
            f'model.diff_attention = "{model.diff_attention}" rotates half heads, but '
            f"model.model_dim / model.num_heads = {model.head_dim} is no multiple of 4; "
            "change model.num_heads"
        )
    if model.rope_dims % 2 or model.rope_dims > width:
        faults.append(
            f"model.rope_dims = {model.rope_dims} is not an even number from 0 to {width}, the "
            "width that rotates; change it"
        )
    if model.rope_ntk_len and model.rotated_dims < 4:
        faults.append(
            f"model.rope_ntk_len = {model.rope_ntk_len} needs at least 4 rotated dimensions, "
            f"but {model.rotated_dims} rotate; raise model.rope_dims or set 0"
        )
    if model.max_doc_len and not model.document_attention:
        faults.append(
            f"model.max_doc_len = {model.max_doc_len} cuts nothing while "
            "model.document_attention = false; switch that on, or set 0"
        )
    if model.bigram_buckets == 1:
        faults.append("model.bigram_buckets = 1 leaves no bucket for a pair; set 2 or more, or 0")
    if model.smear == "token" and model.smear_gate_dim > model.model_dim:
        faults.append(
            f"model.smear_gate_dim = {model.smear_gate_dim} is above model.model_dim = "
            f"{model.model_dim}; lower it"
        )
    return faults


def faults_of_loops(model: ModelConfig) -> list[str]:
    if model.num_loops == 1:
        needless = f"model.lora_rank = {model.lora_rank} tells visits apart, but "
        remedy = "model.num_loops = 1; raise model.num_loops or set model.lora_rank = 0"
        return [needless + remedy] if model.lora_rank else []
    switches: dict[str, tuple[object, object]] = {
        "gated_skips": (model.gated_skips, False),
        "backout_layer": (model.backout_layer, -1),
        "resid_lambda_init": (model.resid_lambda_init, 0.0),
        "value_residual": (model.value_residual, "off"),
        "diff_attention": (model.diff_attention, "off"),
        "recur_visits": (model.recur_visits, 1),
        "parallel": (model.parallel, "off"),
        "layer_scale": (model.layer_scale, False),
        "attn_gate": (model.attn_gate, "off"),
        "mlp_kind": (model.mlp_kind, "squared"),
        "out_init": (model.out_init, "zeros"),
        "resid_mix": (model.resid_mix, "channel"),
        "branch_scales": (model.branch_scales, "channel"),
        "qk_gain": (model.qk_gain, "learned"),
        "value_proj_layers": (model.value_proj_layers, ""),
        "xsa_strength": (model.xsa_strength, "full"),
        "attn_dropout": (model.attn_dropout, 0.0),
        "mlp_dropout": (model.mlp_dropout, 0.0),
        "stoch_depth": (model.stoch_depth, 0.0),
        "mtp_weight": (model.mtp_weight, 0.0),
        "num_passes": (model.num_passes, 1),
        "no_attention_layers": (model.no_attention_layers, ""),
    }
    return [
        f"model.{name} = {value!r} is not defined for blocks that are visited "
        f"model.num_loops = {model.num_loops} times; set model.{name} = {off!r} or "
        "model.num_loops = 1"
        for name, (value, off) in switches.items()
        if value != off
    ]


def faults_of_recurrence(model: ModelConfig) -> list[str]:
    if model.recur_visits == 1:
        switches = {
            "recur_blend": (model.recur_blend, "off"),
            "recur_lora_rank": (model.recur_lora_rank, 0),
            "recur_untied_mlp": (model.recur_untied_mlp, ""),
        }
        return [
            f"model.{name} = {value!r} is about repeat visits, but model.recur_visits = 1; "
            f"raise it or set model.{name} = {off!r}"
            for name, (value, off) in switches.items()
            if value != off
        ]
    if not model.recur_first <= model.recur_last < model.num_layers:
        return [
            f"model.recur_first = {model.recur_first} and model.recur_last = {model.recur_last} "
            f"are no range of blocks from 0 to {model.num_layers - 1}; change them, or set "
            "model.recur_visits = 1"
        ]
    strange = {layer for layer in model.layers_of("recur_untied_mlp") if not model.recurs(layer)}
    return [
        f"model.recur_untied_mlp = {model.recur_untied_mlp!r} names layer {layer}, which does "
        f"not recur; choose from {model.recur_first} to {model.recur_last}"
        for layer in sorted(strange)
    ]


def faults_of_slowrun_parts(model: ModelConfig) -> list[str]:
    faults = []
    if model.padded_vocab and model.padded_vocab < model.vocab_size:
        faults.append(
            f"model.padded_vocab = {model.padded_vocab} is below model.vocab_size = "
            f"{model.vocab_size}; raise it, or set 0"
        )
    if model.head_init_std and model.tie_embeddings:
        faults.append(
            f"model.head_init_std = {model.head_init_std:g} is about a head of its own; set "
            "model.tie_embeddings = false, or 0"
        )
    if model.value_proj_layers and model.value_proj_gate_dim > model.model_dim:
        faults.append(
            f"model.value_proj_gate_dim = {model.value_proj_gate_dim} is above model.model_dim "
            f"= {model.model_dim}; lower it"
        )
    if model.xsa_strength == "learned" and not model.xsa_last_n:
        faults.append(
            'model.xsa_strength = "learned" has no layer while model.xsa_last_n = 0; raise it, '
            'or set model.xsa_strength = "full"'
        )
    if model.mlp_kind == "swiglu" and model.leaky_slope:
        faults.append(
            f'model.leaky_slope = {model.leaky_slope:g} bends no model.mlp_kind = "swiglu"; set 0'
        )
    if model.mlp_kind == "swiglu" and model.recur_lora_rank:
        faults.append(
            f"model.recur_lora_rank = {model.recur_lora_rank} has no adapter for the third "
            'matrix of model.mlp_kind = "swiglu"; set 0'
        )
    return faults + _faults_of_scales_and_positions(model)


def _faults_of_scales_and_positions(model: ModelConfig) -> list[str]:
    faults = []
    if model.branch_scales == "none" and (model.layer_scale or model.layer_scale_init != 1):
        faults.append(
            'model.branch_scales = "none" leaves nothing for model.layer_scale = '
            f"{model.layer_scale} and model.layer_scale_init = {model.layer_scale_init:g}; set "
            "false and 1"
        )
    if model.qk_gain == "off" and model.diff_attention != "off":
        faults.append(
            f'model.qk_gain = "off" is not defined for model.diff_attention = '
            f'"{model.diff_attention}"; set one of them back'
        )
    is_early = model.recur_visits > 1 and model.recur_first < model.num_layers // 2
    if model.num_passes > 1 and model.recur_visits > 1:
        faults.append(
            f"model.num_passes = {model.num_passes} and model.recur_visits = "
            f"{model.recur_visits} would both follow schedule.recur_start; set one to 1"
        )
    if model.stoch_depth and (model.parallel == "lanes" or model.num_layers == 1):
        faults.append(
            f"model.stoch_depth = {model.stoch_depth:g} needs two blocks of one stream; set 0, "
            'or raise model.num_layers and set model.parallel = "off"'
        )
    if model.half_rope and (model.rotary_width % 4 or model.rope_dims or model.rope_ntk_len):
        faults.append(
            "model.half_rope = true needs heads of a multiple of 4 dimensions, model.rope_dims "
            "= 0 and model.rope_ntk_len = 0; change them, or set false"
        )
    if model.key_offset_layers and (model.document_attention or model.diff_attention != "off"):
        faults.append(
            f"model.key_offset_layers = {model.key_offset_layers!r} moves keys across the "
            "start of a document and knows one map: set model.document_attention = false and "
            'model.diff_attention = "off"'
        )
    if model.recur_skips == "layers" and is_early:
        faults.append(
            f'model.recur_skips = "layers" needs blocks of the second half, but '
            f"model.recur_first = {model.recur_first}; raise it to {model.num_layers // 2}"
        )
    return faults


def faults_of_parallel(model: ModelConfig) -> list[str]:
    faults = []
    if model.parallel != "off" and model.parallel_start >= model.num_layers:
        faults.append(
            f"model.parallel_start = {model.parallel_start} is no block from 0 to "
            f'{model.num_layers - 1}; lower it, or set model.parallel = "off"'
        )
    if model.parallel != "off" and model.resid_lambda_init:
        faults.append(
            f"model.resid_lambda_init = {model.resid_lambda_init:g} is not defined for "
            f'model.parallel = "{model.parallel}"; set one of them off'
        )
    if model.parallel == "lanes" and model.backout_layer >= model.parallel_start:
        faults.append(
            f"model.backout_layer = {model.backout_layer} has two lanes, which begin at "
            f"model.parallel_start = {model.parallel_start}; choose an earlier block"
        )
    recurs_to = model.recur_last if model.recur_visits > 1 else -1
    if model.parallel == "lanes" and recurs_to >= model.parallel_start:
        faults.append(
            f"model.recur_last = {model.recur_last} would recur in two lanes, which begin at "
            f"model.parallel_start = {model.parallel_start}; lower it, or set model.parallel = "
            '"joint"'
        )
    if model.attn_gate in ("window", "sparse") and model.attn_gate_dim > model.model_dim:
        faults.append(
            f"model.attn_gate_dim = {model.attn_gate_dim} is above model.model_dim = "
            f"{model.model_dim}; lower it"
        )
    return faults + _faults_of_missing_attention(model)


def _faults_of_missing_attention(model: ModelConfig) -> list[str]:
    missing = model.layers_of("no_attention_layers")
    faults = []
    if 0 in missing and model.value_residual != "off":
        faults.append(
            f'model.value_residual = "{model.value_residual}" mixes in the values of layer 0, '
            f"which model.no_attention_layers = {model.no_attention_layers!r} takes away; set "
            'model.value_residual = "off"'
        )
    if model.parallel == "lanes" and any(model.is_parallel(layer) for layer in missing):
        faults.append(
            f"model.no_attention_layers = {model.no_attention_layers!r} has a layer in two "
            f"lanes, which begin at model.parallel_start = {model.parallel_start} and of which "
            "one is attention's; name earlier layers"
        )
    if any(layer in missing for layer in model.layers_of("value_embed_layers")):
        faults.append(
            f"model.value_embed_layers = {model.value_embed_layers!r} and "
            f"model.no_attention_layers = {model.no_attention_layers!r} share a layer, which "
            "has no values; name it in one of them"
        )
    return faults
