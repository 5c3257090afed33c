"""Settings of the model: its shape, and every switch of its architecture."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import PositiveFloat, PositiveInt, Settings, raise_together
from trainer.config.iha import faults_of_iha, iha_layers, pseudo_window
from trainer.config.model_faults import (
    faults_of_layers,
    faults_of_loops,
    faults_of_parallel,
    faults_of_recurrence,
    faults_of_slowrun_parts,
    faults_of_techniques,
)
from trainer.config.recurrence import Place, count_skips, visit_order
from trainer.config.window_stages import (
    WindowStage,
    faults_of_window_stages,
    parse_window_stages,
)
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
    mlp_kind: Literal["squared", "swiglu"] = "squared"
    """"squared": down(relu(up x)^2), or its leaky form. "swiglu": down(silu(swish x) * up x), a
    third matrix."""
    matrix_init: Literal["uniform", "orthogonal", "unit"] = "uniform"
    """Initial q, k, v and up matrices: PyTorch's default for linear layers; orthogonal; or uniform
    with standard deviation 1 / sqrt(inputs)."""
    out_init: Literal["zeros", "normal"] = "zeros"
    """Initial matrices that write to the residual stream; "normal" has standard deviation 1 /
    sqrt(model_dim)."""
    head_init_std: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of an untied head's initial weights; 0 = zeros."""
    padded_vocab: Annotated[int, Field(ge=0)] = 0
    """Rows of embedding and head where a multiple of 64 is faster than vocab_size; the logits of
    those beyond are dropped. 0 = vocab_size."""
    resid_mix: Literal["channel", "scalar", "none"] = "channel"
    """Learned factors on stream and embedding before each block: one per channel, one each
    (slowrun), or none."""
    resid_keep_init: PositiveFloat = 1.0
    """Initial factor on the stream of resid_mix = "scalar"."""
    embed_mix_init: float = 0.1
    """Initial factor on the embedding of resid_mix = "scalar"."""
    branch_scales: Literal["channel", "none"] = "channel"
    """Learned scales per channel on what attention and MLP add, or none."""
    qk_gain: Literal["learned", "off"] = "learned"
    """The gain of qk_gain_init, or none."""
    skip_kind: Literal["channel", "scalar"] = "channel"
    """A skip's learned weight, and its gate: per channel, or one number."""
    attn_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of what attention adds that training zeroes, at random; the rest grows; 0 = off."""
    mlp_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same of what the MLP adds."""
    stoch_depth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance that a training pass leaves out the last block for a whole micro-batch; that of block
    i of L is i / (L - 1) of it. Nothing is rescaled. 0 = off."""
    mtp_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the loss of the token after the next, predicted by one more block that training
    alone runs (DeepSeek-V3); 0 = off. Its weights stay in the model."""
    num_passes: PositiveInt = 1
    """Times that the whole network is run, in all, each pass normalised and fed with the one
    before; 1 = off. schedule.recur_start puts it off in training."""
    passes_gradient: Literal["last", "all"] = "last"
    """Passes that carry a gradient."""
    half_rope: bool = False
    """Only the faster half of the rotary frequencies turn, at base rope_base over half a head; the
    others carry no position."""
    key_offset_layers: str = ""
    """Layers whose keys have their second half from the token before, as in
    trainer/layer_pattern.py; "" = none."""
    value_proj_layers: str = ""
    """Layers whose values a projection of the normalised embedding joins, 2 sigmoid(w_g n[:W])
    times it, from 1 (slowrun: "odd"), as in trainer/layer_pattern.py; "" = none."""
    value_proj_gate_dim: PositiveInt = 32
    """W, the leading channels that its gate reads."""
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
    xsa_strength: Literal["full", "learned"] = "full"
    """How much of that part: all, or tanh of a learned number per head, from 0."""
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
    recur_visits: PositiveInt = 1
    """Times that blocks recur_first..recur_last are visited in a row, in all, with everything
    shared; 1 = off. schedule.recur_start puts it off in training; everything else always recurs."""
    recur_first: Annotated[int, Field(ge=0)] = 3
    """First block that recurs, from 0."""
    recur_last: Annotated[int, Field(ge=0)] = 5
    """Last block that recurs."""
    recur_skips: Literal["all", "plain", "layers"] = "all"
    """Skips with recurrence: one for every output of the longer first half; as many as without
    recurrence, so that the rest is dropped (#1894); or "layers", in which each visit of a block of
    the second half takes the skip of that block again (slowrun)."""
    recur_blend: Literal["off", "alpha", "ab"] = "off"
    """What a repeat visit makes of its input x, its output y and the output z of the visit of the
    same block before: "alpha", x + alpha (y - x); "ab", a y + b z; learned for each repeat."""
    recur_alpha_init: float = 1.0
    """Initial alpha; 1 = the plain repeat."""
    recur_a_init: float = 1.0
    """Initial a."""
    recur_b_init: float = 0.0
    """Initial b; a = 1 and b = 0 are the plain repeat."""
    recur_lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the adapters that each repeat visit adds to the matrices of its block; 0 = none."""
    recur_untied_mlp: str = ""
    """Recurring layers whose repeats each have an MLP of their own (#1204), as in
    trainer/layer_pattern.py; "" = none."""
    no_attention_layers: str = ""
    """Layers that are only an MLP (#1204: "first_1"), as in trainer/layer_pattern.py; "" = none."""
    parallel: Literal["off", "joint", "lanes"] = "off"
    """Attention and MLP side by side from block parallel_start on: "joint", both read one stream
    and both add to it (GPT-J); "lanes", each reads a stream of its own and adds to both (#1204)."""
    parallel_start: Annotated[int, Field(ge=0)] = 7
    """First block of parallel, from 0."""
    parallel_merge: Literal["mean", "attention", "mlp", "learned"] = "mean"
    """The stream that leaves the lanes: their mean, one of them, or a learned mixture that begins
    as the mean."""
    parallel_resid_init: float = 1.1
    """Initial factor on a lane in each block."""
    parallel_factors: Literal["used", "all"] = "used"
    """"all": the blocks before the lanes have their factors, too, which nothing reads and nothing
    trains. Only for the published number of parameters (#1855: 48 more)."""
    layer_scale: bool = False
    """A third learned scale per channel, on what attention and MLP add alike (#1894);
    layer_scale_init is then its start, and the other two start at 1."""
    attn_gate: Literal["off", "window", "dense", "sparse", "biased"] = "off"
    """A gate on each head's output, read from the block's normalised input n: "window",
    2 sigmoid(w n[:W]) (#1667); "dense", sigmoid(w n) (#1736); "sparse", sigmoid(s w n[:W])
    (#1787); "biased", sigmoid(w n + b) (#1212, #1894)."""
    attn_gate_dim: PositiveInt = 12
    """W, the leading channels that "window" and "sparse" read."""
    attn_gate_scale: PositiveFloat = 0.5
    """s of "sparse"."""
    attn_gate_init_std: Annotated[float, Field(ge=0)] = 0.005
    """Standard deviation of the initial w of "dense"; the others begin at 0."""
    attn_gate_bias_init: float = 4.0
    """Initial b of "biased": 4 in #1212, 1 in #1894."""

    document_attention: bool = False
    """Tokens attend within their own document only; bos_id begins one."""
    max_doc_len: Annotated[int, Field(ge=0)] = 0
    """With document_attention: cut documents into pieces of so many tokens that do not see each
    other; 0 = off."""

    iha: Literal["off", "fused", "interleaved"] = "off"
    """Heads mix before attention (interleaved head attention): "fused", by a matrix of head by head
    folded into each projection (slowrun main); "interleaved", into pseudo-heads that stand side by
    side in the sequence (slowrun #78)."""
    iha_layers: str = "all"
    """Layers that iha applies to: as in trainer/layer_pattern.py, or "short" for those with a
    window, or "long" for the others."""
    iha_fused: Literal["qkv", "qkvo"] = "qkv"
    """Projections that iha = "fused" mixes."""
    iha_pseudo_heads: Annotated[int, Field(ge=1, le=16)] = 2
    """P, the pseudo-heads of a head under iha = "interleaved"; the sequence is P times as long."""
    iha_init: Literal["first", "replicated"] = "first"
    """Initial pseudo-heads: "first", the first one is the head and the others are zero (published;
    not plain attention); "replicated", each is the head."""
    iha_positions: Literal["pseudo", "token"] = "pseudo"
    """Rotary position of pseudo-head p of token t: t P + p (published), or t."""
    iha_mask: Literal["causal", "block"] = "causal"
    """What a pseudo-token sees of its own token: pseudo-heads up to itself (published), or all.
    Replicated, with positions and windows by "token", "block" begins as plain attention."""
    iha_windows: Literal["flops", "tokens"] = "flops"
    """A window in interleaved layers: "flops", window / P pseudo-tokens, as much work as the plain
    window (published); "tokens", as many tokens as the plain window."""
    iha_collapse: Literal["own", "all"] = "own"
    """What a head becomes: a sum of its own pseudo-heads (published), or of those of all heads (the
    paper)."""
    iha_product: Literal["heads", "weights"] = "heads"
    """How queries and keys of pseudo-heads are made: by mixing the projected heads, or by one
    projection with mixed weights, P times as wide, which moves less memory for more operations.
    The same numbers but for rounding."""
    qk_norm: Literal["before_rope", "after_rope"] = "before_rope"
    """Whether queries and keys are normalised before they rotate or after. A rotation keeps the
    norm, so that only the rounding differs."""

    window_stages: str = ""
    """Windows that grow in the course of the run, as SHORT:LONG of the layers with and without a
    window, with the share of the budget from which: "256:768,768:1792@0.3,1280:2048@0.6"; YaRN
    stretches positions on the way. The last short one is window. "" = off."""

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
        faults += faults_of_layers(self) + faults_of_techniques(self) + faults_of_loops(self)
        faults += faults_of_recurrence(self) + faults_of_parallel(self)
        faults += faults_of_slowrun_parts(self)
        faults += faults_of_iha(self) if self.iha != "off" else []
        faults += faults_of_window_stages(self) if self.window_stages else []
        return raise_together(self, faults)

    def layers_of(self, name: str) -> tuple[int, ...]:
        """Layers of a setting; none where the setting is at fault."""
        try:
            return select_layers(getattr(self, name), self.num_layers)
        except ValueError:
            return ()

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
    def table_rows(self) -> int:
        """Rows of the embedding and of an untied head."""
        return self.padded_vocab or self.vocab_size

    @property
    def num_skips(self) -> int:
        """Skips from the first half of the blocks to the second, without recurrence."""
        return self.num_layers // 2 if self.num_loops == 1 else 0

    @property
    def num_recur_skips(self) -> int:
        """Skips that only recurrence has."""
        if self.recur_skips != "all" or self.num_loops > 1:
            return 0
        range_and_visits = (self.recur_first, self.recur_last, self.recur_visits)
        return count_skips(self.num_layers, *range_and_visits) - self.num_skips

    def visit_order(self, visits: int) -> tuple[Place, ...]:
        """The blocks on the way through the model when those that recur are visited so often."""
        return visit_order(self.num_layers, self.recur_first, self.recur_last, visits)

    def recurs(self, layer: int) -> bool:
        """Whether a block has repeat visits."""
        return self.recur_visits > 1 and self.recur_first <= layer <= self.recur_last

    def unties_mlp(self, layer: int) -> bool:
        """Whether the repeats of a block have MLPs of their own."""
        return self.recurs(layer) and layer in self.layers_of("recur_untied_mlp")

    def attends(self, layer: int) -> bool:
        """Whether a block has attention."""
        return layer not in self.layers_of("no_attention_layers")

    def projects_values(self, layer: int) -> bool:
        """Whether a projection of the embedding joins this layer's values."""
        return self.attends(layer) and layer in self.layers_of("value_proj_layers")

    def excludes(self, layer: int) -> bool:
        """Whether a layer's attention output loses its part along the token's own value."""
        return layer >= self.num_layers - self.xsa_last_n

    def offsets_keys(self, layer: int) -> bool:
        """Whether a layer's keys have their second half from the token before."""
        return layer in self.layers_of("key_offset_layers")

    @property
    def is_noisy(self) -> bool:
        """Whether a training pass draws random numbers."""
        return bool(self.attn_dropout or self.mlp_dropout or self.stoch_depth)

    @property
    def most_visits(self) -> int:
        """What schedule.recur_start switches on: visits of the recurring blocks, or passes."""
        return max(self.recur_visits, self.num_passes)

    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP of a block stand side by side."""
        return self.parallel != "off" and layer >= self.parallel_start

    def window_of(self, layer: int) -> int | None:
        """Tokens before itself that a token sees in this layer in the end; None = all."""
        if layer in select_layers(self.window_layers, self.num_layers):
            return self.window
        return self.stages[-1].long if self.stages else None

    @property
    def stages(self) -> tuple[WindowStage, ...]:
        """The stages of window_stages, if any."""
        return parse_window_stages(self.window_stages) if self.window_stages else ()

    def stage_windows(self, layer: int) -> tuple[int, ...]:
        """What window_of is in each of the stages."""
        is_short = layer in select_layers(self.window_layers, self.num_layers)
        return tuple(stage.short if is_short else stage.long for stage in self.stages)

    def embeds_values(self, layer: int) -> bool:
        """Whether value embeddings join this layer."""
        return layer in select_layers(self.value_embed_layers, self.num_layers)

    def iha_of(self, layer: int) -> Literal["off", "fused", "interleaved"]:
        """How the heads of a layer mix. What stands behind the last layer is as "all" and "long"
        have it."""
        if self.iha == "off":
            return "off"
        is_behind = layer >= self.num_layers and self.iha_layers in ("all", "long")
        return self.iha if is_behind or layer in iha_layers(self) else "off"

    def pseudo_window_of(self, layer: int) -> int | None:
        """The window of an interleaved layer, in pseudo-tokens, or in tokens under iha_mask =
        "block"; None = all."""
        window = self.window_of(layer)
        return None if window is None else pseudo_window(self, window)

    @property
    def positions_per_token(self) -> int:
        """Rotary positions that a token takes in interleaved layers."""
        is_pseudo = self.iha == "interleaved" and self.iha_positions == "pseudo"
        return self.iha_pseudo_heads if is_pseudo else 1
