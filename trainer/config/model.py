"""Settings of the model: its shape, and every switch of its architecture."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import PositiveFloat, PositiveInt, Settings, raise_together
from trainer.layer_pattern import select_layers


class ModelConfig(Settings):
    """Shape of the transformer."""

    vocab_size: PositiveInt = 1024
    """Rows of the embedding table; must equal the tokenizer's number of pieces."""
    num_layers: PositiveInt = 9
    """Transformer blocks; the first half feeds the second half through skips (U-Net)."""
    model_dim: PositiveInt = 512
    """Width of the residual stream."""
    num_heads: PositiveInt = 8
    """Query heads; must divide model_dim."""
    num_kv_heads: PositiveInt = 4
    """Key and value heads (GQA); must divide num_heads."""
    mlp_mult: PositiveFloat = 2.0
    """Hidden width of the MLP as a multiple of model_dim."""
    tie_embeddings: bool = True
    """The output head is the transposed input embedding."""
    tied_embed_init_std: PositiveFloat = 0.005
    """Standard deviation of the initial embedding when tied."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    qk_gain_init: PositiveFloat = 1.5
    """Initial per-head gain on the normalised queries."""
    logit_softcap: PositiveFloat = 30.0
    """Logits are squashed to +-softcap by softcap * tanh(logits / softcap)."""
    leaky_slope: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Slope of the MLP's activation below 0, before squaring; 0 = squared ReLU."""
    matrix_init: Literal["uniform", "orthogonal"] = "uniform"
    """Initial q, k, v and up matrices: PyTorch's default for linear layers, or orthogonal."""
    layer_scale_init: PositiveFloat = 1.0
    """Initial per-channel scale of what attention and MLP add to the residual stream."""
    ln_scale: bool = False
    """Multiply the normalised inputs of block i (from 0) by 1 / sqrt(i + 1)."""
    gated_skips: bool = False
    """Skips interpolate with a learned gate per channel instead of adding."""
    resid_lambda_init: Annotated[float, Field(ge=0)] = 0.0
    """Initial learned factor on the residual stream at each of a block's two additions; published:
    sqrt(1.1). 0 = off."""
    backout_layer: Annotated[int, Field(ge=-1)] = -1
    """Block whose output, times a learned factor, is taken away before the head; -1 = off."""
    backout_init: float = 0.1
    """Initial factor of backout."""
    bigram_buckets: Annotated[int, Field(ge=0)] = 0
    """Rows of the table that hashed pairs of tokens look up, one kept for a token without a
    predecessor; 0 = off."""
    bigram_dim: PositiveInt = 128
    """Width of that table; a projection follows unless it equals model_dim."""
    smear: Literal["off", "channel", "token"] = "off"
    """Mix in the previous token's embedding: "channel" after the norm, one gate per channel;
    "token" before it, one gate per token read from the embedding."""
    smear_gate_dim: PositiveInt = 12
    """Leading channels that the gate of smear = "token" reads."""
    mask_documents: bool = True
    """A token that begins a document has no previous token for smear and bigrams. Switched off only
    to replay published runs, which leak across documents."""
    bos_id: Annotated[int, Field(ge=0)] = 1
    """Token that begins a document, for mask_documents and document_attention."""
    value_embed_dim: Annotated[int, Field(ge=0)] = 0
    """Width of the table of value embeddings; 0 = off."""
    value_embed_layers: str = ""
    """Layers whose values they join, as in trainer/layer_pattern.py; "" = none."""
    value_residual: Literal["off", "half", "gated", "learned"] = "off"
    """Mix layer 0's values into later layers: "half" averages with them, detached (parameter-golf
    #675); "gated" interpolates with a learned gate (#657); "learned" has two free factors
    (#1212)."""
    window: Annotated[int, Field(ge=0)] = 0
    """Tokens before itself that a token sees in the layers of window_layers; 0 = off."""
    window_layers: str = ""
    """Layers with a window, as in trainer/layer_pattern.py: "2,4,6", "even", "spread_5"; "" =
    none."""
    xsa_last_n: Annotated[int, Field(ge=0)] = 0
    """Last layers whose attention output loses its part along the token's own value; 0 = off."""
    rope_dims: Annotated[int, Field(ge=0)] = 0
    """Leading dimensions of a head that rotate; 0 = all."""
    rope_ntk_len: Annotated[int, Field(ge=0)] = 0
    """Rows longer than this raise the rotary base by the NTK rule, in training and in evaluation
    alike; 0 = off."""
    gqa: Literal["native", "repeat"] = "native"
    """Grouped queries by the attention backend, or by repeating keys and values before it."""
    diff_attention: Literal["off", "full", "split"] = "off"
    """Difference of two attention maps: "full" applies both to whole values; "split" gives each map
    half of the values and sets the results side by side (another operator, published as a faster
    form)."""
    num_loops: PositiveInt = 1
    """Times that the stack of num_layers blocks is run with the same matrices; every visit has
    scales of its own, and there are no skips. 1 = off."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapters that tell the visits of num_loops > 1 apart; 0 = none."""
    lora_init_std: Annotated[float, Field(ge=0)] = 0.0
    """Initial second factor of an adapter: normal, times this, over sqrt(rank); 0 = zeros, so that
    all visits begin alike."""

    document_attention: bool = False
    """Tokens attend within their own document only; bos_id begins one."""
    max_doc_len: Annotated[int, Field(ge=0)] = 0
    """With document_attention: cut documents into pieces of so many tokens that do not see each
    other; 0 = off."""

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        faults = []
        if self.model_dim % self.num_heads:
            faults.append(
                f"model.num_heads = {self.num_heads} does not divide model.model_dim = "
                f"{self.model_dim}; choose a divisor"
            )
        elif (self.model_dim // self.num_heads) % 2:
            faults.append(
                f"model.model_dim / model.num_heads = {self.model_dim // self.num_heads} is odd; "
                "rotary embedding needs an even head width"
            )
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = "
                f"{self.num_heads}; choose a divisor"
            )
        faults += self._faults_of_layers() + self._faults_of_techniques() + self._faults_of_loops()
        return raise_together(self, faults)

    def _faults_of_layers(self) -> list[str]:
        faults = []
        for switch, name, pattern in (
            (self.window, "window", self.window_layers),
            (self.value_embed_dim, "value_embed_dim", self.value_embed_layers),
        ):
            owner = "window" if name == "window" else "value_embed"
            if bool(switch) != bool(pattern):
                faults.append(
                    f"model.{name} = {switch} and model.{owner}_layers = {pattern!r}: one is "
                    "nothing without the other; set both, or neither"
                )
            try:
                select_layers(pattern, self.num_layers)
            except ValueError as error:
                faults.append(f"model.{owner}_layers = {pattern!r}: {error}")
        if self.backout_layer > max(-1, self.num_layers - 2):
            faults.append(
                f"model.backout_layer = {self.backout_layer} is no layer before the last, whose "
                f"output would only be scaled; choose from 0 to {self.num_layers - 2}, or -1 for "
                "none"
            )
        if self.xsa_last_n > self.num_layers:
            faults.append(
                f"model.xsa_last_n = {self.xsa_last_n} is above model.num_layers = "
                f"{self.num_layers}; lower it"
            )
        return faults

    def _faults_of_techniques(self) -> list[str]:
        faults = []
        width = self.rotary_width
        if self.diff_attention != "off" and self.head_dim % 4:
            faults.append(
                f'model.diff_attention = "{self.diff_attention}" rotates half heads, but '
                f"model.model_dim / model.num_heads = {self.head_dim} is no multiple of 4; "
                "change model.num_heads"
            )
        if self.rope_dims % 2 or self.rope_dims > width:
            faults.append(
                f"model.rope_dims = {self.rope_dims} is not an even number from 0 to {width}, the "
                "width that rotates; change it"
            )
        if self.rope_ntk_len and self.rotated_dims < 4:
            faults.append(
                f"model.rope_ntk_len = {self.rope_ntk_len} needs at least 4 rotated dimensions, "
                f"but {self.rotated_dims} rotate; raise model.rope_dims or set 0"
            )
        if self.max_doc_len and not self.document_attention:
            faults.append(
                f"model.max_doc_len = {self.max_doc_len} cuts nothing while "
                "model.document_attention = false; switch that on, or set 0"
            )
        if self.bigram_buckets == 1:
            faults.append(
                "model.bigram_buckets = 1 leaves no bucket for a pair; set 2 or more, or 0"
            )
        if self.smear == "token" and self.smear_gate_dim > self.model_dim:
            faults.append(
                f"model.smear_gate_dim = {self.smear_gate_dim} is above model.model_dim = "
                f"{self.model_dim}; lower it"
            )
        return faults

    def _faults_of_loops(self) -> list[str]:
        if self.num_loops == 1:
            needless = f"model.lora_rank = {self.lora_rank} tells visits apart, but "
            remedy = "model.num_loops = 1; raise model.num_loops or set model.lora_rank = 0"
            return [needless + remedy] if self.lora_rank else []
        switches: dict[str, tuple[object, object]] = {
            "gated_skips": (self.gated_skips, False),
            "backout_layer": (self.backout_layer, -1),
            "resid_lambda_init": (self.resid_lambda_init, 0.0),
            "value_residual": (self.value_residual, "off"),
            "diff_attention": (self.diff_attention, "off"),
        }
        return [
            f"model.{name} = {value!r} is not defined for blocks that are visited "
            f"model.num_loops = {self.num_loops} times; set model.{name} = {off!r} or "
            "model.num_loops = 1"
            for name, (value, off) in switches.items()
            if value != off
        ]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def rotary_width(self) -> int:
        """Width that positions may rotate: a head, or half of one in differential attention."""
        return self.head_dim if self.diff_attention == "off" else self.head_dim // 2

    @property
    def rotated_dims(self) -> int:
        """Dimensions that rotate."""
        return self.rope_dims or self.rotary_width

    @property
    def num_skips(self) -> int:
        """Skips from the first half of the blocks to the second."""
        return self.num_layers // 2 if self.num_loops == 1 else 0

    def window_of(self, layer: int) -> int | None:
        """Tokens before itself that a token sees in this layer; None = all."""
        return self.window if layer in select_layers(self.window_layers, self.num_layers) else None

    def embeds_values(self, layer: int) -> bool:
        """Whether value embeddings join this layer."""
        return layer in select_layers(self.value_embed_layers, self.num_layers)
