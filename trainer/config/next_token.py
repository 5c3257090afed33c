"""Settings of the extra block of multi-token prediction: the model and its account both ask. Loads
without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config.model import ModelConfig


def config_of_block(model: ModelConfig) -> ModelConfig:
    """Settings under which a block of the layer after the last is the extra one: it sees everything
    before it, takes nothing but the stream, and mixes its heads as the long layers do."""
    layer = model.num_layers
    off = {
        "num_layers": layer + 1,
        "resid_mix": "none",
        "value_residual": "off",
        "value_embed_dim": 0,
        "value_embed_layers": "",
        "value_proj_layers": "",
        "window": 0,
        "window_layers": "",
        "window_stages": "",
        "xsa_last_n": 0,
        "recur_visits": 1,
        "parallel": "off",
        "no_attention_layers": "",
        "key_offset_layers": "",
        "iha": model.iha_of(layer),
        "iha_layers": "all",
    }
    return model.model_copy(update=off)
