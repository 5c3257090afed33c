"""What the settings of interleaved head attention mean, and which of them do not fit together.

Apart from the settings themselves, because the model, its account and the loop all ask. Loads
without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.layer_pattern import select_layers

if TYPE_CHECKING:
    from trainer.config.model import ModelConfig


def iha_layers(model: ModelConfig) -> tuple[int, ...]:
    """Layers that model.iha applies to. Raises ValueError as select_layers does."""
    if model.iha == "off":
        return ()
    windowed = select_layers(model.window_layers, model.num_layers)
    if model.iha_layers == "short":
        return windowed
    if model.iha_layers == "long":
        return tuple(layer for layer in range(model.num_layers) if layer not in windowed)
    return select_layers(model.iha_layers, model.num_layers)


def pseudo_window(model: ModelConfig, window: int) -> int:
    """A window of so many tokens as model.iha_windows makes of it, in the units of model.iha_mask:
    pseudo-tokens under "causal", tokens under "block"."""
    count = model.iha_pseudo_heads
    pseudo_tokens = window * count if model.iha_windows == "tokens" else window // count
    return pseudo_tokens if model.iha_mask == "causal" else pseudo_tokens // count


def faults_of_iha(model: ModelConfig) -> list[str]:
    """Broken rules, each with dotted path, value and remedy."""
    if model.iha == "off":
        return []
    try:
        select_layers(model.window_layers, model.num_layers)
    except ValueError:
        return []  # told beside that setting
    try:
        layers = iha_layers(model)
    except ValueError as error:
        return [f"model.iha_layers = {model.iha_layers!r}: {error}, or short or long"]
    faults = []
    if not layers:
        faults.append(
            f'model.iha = "{model.iha}" has no layer in model.iha_layers = {model.iha_layers!r}; '
            "name some, or set model.iha = off"
        )
    for name, off in (("diff_attention", "off"), ("num_loops", 1)):
        value = getattr(model, name)
        if value != off:
            faults.append(
                f"model.{name} = {value!r} is not defined for model.iha = "
                f'"{model.iha}"; set model.{name} = {off!r} or model.iha = off'
            )
    return faults + (_faults_of_interleaving(model, layers) if model.iha == "interleaved" else [])


def _faults_of_interleaving(model: ModelConfig, layers: tuple[int, ...]) -> list[str]:
    faults = []
    if model.document_attention:
        faults.append(
            "model.document_attention = true knows no pseudo-tokens, but "
            'model.iha = "interleaved"; set it false, or model.iha = fused'
        )
    if model.iha_product == "weights" and model.recur_lora_rank:
        faults.append(
            f"model.recur_lora_rank = {model.recur_lora_rank} adapts projected heads, which "
            'model.iha_product = "weights" does not have; set model.iha_product = heads, or 0'
        )
    if model.rope_ntk_len and model.iha_positions == "pseudo":
        faults.append(
            f"model.rope_ntk_len = {model.rope_ntk_len} stretches positions of tokens, but "
            'model.iha_positions = "pseudo"; set model.iha_positions = token, or 0'
        )
    if any(model.offsets_keys(layer) for layer in layers):
        faults.append(
            f"model.key_offset_layers = {model.key_offset_layers!r} moves keys of tokens, but "
            'model.iha = "interleaved" in those layers; leave them out of model.iha_layers'
        )
    narrowed = model.window and any(model.window_of(layer) for layer in layers)
    if narrowed and pseudo_window(model, model.window) == 0:
        faults.append(
            f"model.window = {model.window} leaves no window under model.iha_pseudo_heads = "
            f'{model.iha_pseudo_heads} and model.iha_windows = "{model.iha_windows}"; raise it, or '
            "set model.iha_windows = tokens"
        )
    return faults


def faults_of_iha_kernel(model: ModelConfig, kernel: str) -> list[str]:
    """Broken rules of runtime.iha_kernel, which has nothing to do where no head is interleaved, so
    that a sweep may set it for all its trials."""
    if kernel != "fused" or model.iha != "interleaved":
        return []
    faults = []
    if model.iha_product == "weights":
        faults.append(
            'runtime.iha_kernel = "fused" mixes heads, but model.iha_product = "weights" mixes '
            "weights; set one of them back, to compiled or heads"
        )
    if model.rotated_dims != model.head_dim:
        faults.append(
            f"model.rope_dims = {model.rope_dims} turns only a part of a head, but "
            'runtime.iha_kernel = "fused" turns all; set runtime.iha_kernel = compiled or '
            "model.rope_dims = 0"
        )
    return faults
