"""Every setting of a training run, as frozen pydantic models.

A run is `TrainConfig` and nothing else: no environment variable changes a hyperparameter. A sweep
addresses a setting by its dotted path (`"optim.matrix_lr"`); `with_overrides` builds the changed
copy and refuses unknown paths, wrong types and broken cross-field rules, all in one error.

`None` in a budget means "no limit". Loads without torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import ConfigError
from trainer.layer_pattern import select_layers
from trainer.mix import lanes_of, mix_faults

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Bits = Literal[0, 5, 6, 8]
"""Widths of codes for which there is a kernel; 0 = as something else says."""
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def _raise_together(settings: S, faults: list[str]) -> S:
    if faults:
        raise ValueError("\n".join(faults))
    return settings


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
    """Token that begins a document, for mask_documents."""
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
        return _raise_together(self, faults)

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


class OptimConfig(Settings):
    """Muon for the matrices of the blocks, Adam for the rest. Learning rates are peak values."""

    matrix_lr: PositiveFloat = 0.04
    """Muon learning rate of the blocks' matrices."""
    scalar_lr: PositiveFloat = 0.04
    """Adam learning rate of vectors and control tensors."""
    tied_embed_lr: PositiveFloat = 0.05
    """Adam learning rate of the embedding when it is tied to the head."""
    embed_lr: PositiveFloat = 0.6
    """Adam learning rate of the embedding when it is not tied."""
    head_lr: PositiveFloat = 0.008
    """Adam learning rate of the head when it is not tied."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon after its warm-up."""
    muon_momentum_warmup_start: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """Momentum of Muon at step 0."""
    muon_momentum_warmup_steps: Annotated[int, Field(ge=0)] = 500
    """Steps over which the momentum rises linearly; 0 = none."""
    muon_backend_steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the blocks' matrices, times the learning rate; 0 = off."""
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Global gradient norm bound; 0 = off."""
    matrix_lr_late: Annotated[float, Field(ge=0)] = 0.0
    """Muon learning rate of the second half of the blocks; 0 = matrix_lr."""
    scalar_lr_late: Annotated[float, Field(ge=0)] = 0.0
    """Adam learning rate of vectors and control tensors of the second half of the blocks; 0 =
    scalar_lr. Those outside the blocks always take scalar_lr."""
    muon_comm: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    """How ranks share Muon's work. "all_reduce": every rank averages all gradients and keeps all
    momentum. "reduce_scatter": a rank receives only the gradients of its share of each bank of
    matrices, keeps only their momentum, and hands round the results."""
    muon_momentum_warmup_frac: Fraction = 0.0
    """Share of the budget over which Muon's momentum rises, in place of
    muon_momentum_warmup_steps; 0 = by steps."""
    weight_decay_ramp: Annotated[float, Field(ge=0)] = 0.0
    """Added to weight_decay times (1 - learning-rate multiplier), so that decay grows while the
    rate falls; 0 = constant."""
    scalar_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of vectors and control tensors; 0 = off."""
    embed_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the embedding and other tables that tokens look up; 0 = off."""
    head_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of an untied head; 0 = off."""
    lora_lr: PositiveFloat = 0.04
    """Adam learning rate of the adapters of shared blocks."""


class ScheduleConfig(Settings):
    """How learning rates follow the budget."""

    progress: Literal["clock", "steps"] = "clock"
    """What drives the schedules: the share of budget.train_seconds that is spent, or the share of
    budget.max_steps. "steps" makes a run reproducible bit for bit on one machine."""
    warmdown: Literal["steps", "fraction"] = "steps"
    """"steps": decay over the last warmdown_steps at the present step time, as the challenge's
    baseline does. "fraction": decay over the last warmdown_frac of the budget."""
    warmdown_steps: Annotated[int, Field(ge=0)] = 1200
    """Length of the warmdown for "steps"; 0 = no warmdown."""
    warmdown_frac: Fraction = 0.1
    """Length of the warmdown for "fraction"; 0 = no warmdown."""
    min_lr: Fraction = 0.0
    """Floor of the learning-rate multiplier."""


class DataConfig(Settings):
    """What is read and in which portions."""

    dir: str = ""
    """Folder with *_train_*.bin, *_val_*.bin and a .model tokenizer. Not part of the digest: the
    content is, through the data digest in provenance.json."""
    seq_len: PositiveInt = 1024
    """Tokens per training row."""
    batch_tokens: PositiveInt = 524_288
    """Tokens per optimiser step over all workers."""
    micro_batch_tokens: PositiveInt = 65_536
    """Largest number of tokens one worker sends through the model at once; the rest accumulates."""
    val_tokens: Annotated[int, Field(ge=0)] = 0
    """Number of scored validation tokens that evaluation must find; 0 = whatever the data set has.
    A wrong count means a truncated or foreign validation set."""
    mix: str = ""
    """Rows of different lengths within a step, one lane for each of the workers it is written for:
    "5x2048+3x6144" is five lanes with rows of 2048 tokens and three of 6144, each lane an equal
    part of batch_tokens; "5x2048@36+3x6144@10" gives the rows of a lane. Fewer workers run several
    lanes each. "" = off: all rows are of seq_len, which a mix does not use."""
    mix_weighting: Literal["token", "worker"] = "token"
    """What counts alike in the gradient of a mix: every token, or every lane's mean, as published.
    The same unless lanes differ in tokens."""
    loader: Literal["sequential", "shuffled", "coprime", "document"] = "sequential"
    """Order of rows. "sequential": the stream as it is. "shuffled": every window of a row's length
    once an epoch, at random. "coprime": windows in coprime strides, a few shards at a time.
    "document": as sequential, but a shard starts at its first document and no step leaves it."""
    train_split: Literal["train", "val", "both"] = "train"
    """Text to train on. All but "train" is illegal on the golf tracks: for replays only."""

    @property
    def row_lengths(self) -> set[int]:
        """Tokens of the training rows, each length once."""
        return {lane.seq_len for lane in lanes_of(self)}

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        faults = mix_faults(self)
        if self.mix:
            return _raise_together(self, faults)
        if self.batch_tokens % self.seq_len:
            faults.append(
                f"data.seq_len = {self.seq_len} does not divide data.batch_tokens = "
                f"{self.batch_tokens}; choose a multiple"
            )
        if self.micro_batch_tokens < self.seq_len:
            faults.append(
                f"data.micro_batch_tokens = {self.micro_batch_tokens} is less than one row of "
                f"data.seq_len = {self.seq_len}; raise it"
            )
        return _raise_together(self, faults)


class QuantizeConfig(Settings):
    """How trained weights become small integers."""

    scheme: Literal["int8", "int6"] = "int8"
    """"int8": the challenge baseline's per-row int8. "int6": per-row symmetric 6 bits."""
    clip_percentile: Annotated[float, Field(gt=50, le=100)] = 99.99984
    """Percentile of |w| in a row that becomes the largest code."""
    keep_float_max_numel: Annotated[int, Field(ge=0)] = 65_536
    """Tensors of at most this many elements stay 16-bit floats (control tensors 32-bit)."""
    embed_bits: Bits = 0
    """Bits of the token embedding; 0 = as the scheme says."""
    scale_floor: PositiveFloat = 1e-12
    """Smallest scale. The published baseline used 1/127, which makes every row whose clip is below
    1 share one coarse step; 1/127 replays it."""
    matrix_bits: Bits = 0
    """Bits of every other coded tensor; 0 = as the scheme says."""
    attn_bits: Bits = 0
    """Bits of the matrices of attention; 0 = as the other matrices."""
    mlp_bits: Bits = 0
    """Bits of the matrices of the MLPs; 0 = as the other matrices."""
    outer_layers: Annotated[int, Field(ge=0)] = 0
    """So many first and so many last blocks keep outer_bits in all their matrices; 0 = none."""
    outer_bits: Literal[5, 6, 8] = 8
    """Bits of the matrices of the outer blocks."""
    clip: Literal["percentile", "search"] = "percentile"
    """"percentile": clip_percentile for every row. "search": of five percentiles from 99.9 to 100,
    each row takes the one with the least squared error."""
    method: Literal["round", "gptq"] = "round"
    """"round": each weight to the nearest code. "gptq": columns one after another, the error of
    each made up for by the later ones, on the inputs that the matrices really see."""
    calibration: Literal["train", "self"] = "train"
    """Where GPTQ's inputs come from: the next training batches, or text that the model writes."""
    calibration_tokens: PositiveInt = 131_072
    """Tokens of calibration over all workers, rounded up to whole micro batches (rows of
    data.seq_len for "self")."""
    calibration_temperature: PositiveFloat = 0.8
    """Sharpness with which the model samples its own calibration text."""
    reserve_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of budget.train_seconds that are kept for calibration: steps end so much earlier.
    Needed by "gptq" under a clock, ignored otherwise."""
    damping: PositiveFloat = 0.01
    """Share of the mean diagonal that GPTQ adds to the diagonal of a Hessian."""
    act_order: bool = True
    """GPTQ takes the columns with the largest inputs first."""
    qat_start: Fraction = 1.0
    """Share of the budget from which training sees the weights as the artifact will hold them;
    1 = off."""
    floor_by_levels: bool = False
    """No scale below 1 over the largest code (1/31 at 6 bits, 1/127 at 8) instead of scale_floor:
    published runs until April, which fit the cap by it; rows of small weights share a coarse
    step."""

    def bits_of(self, name: str, num_layers: int) -> int:
        """Bits of the codes of a tensor that is large enough to be coded, by its name in the state
        dict of a model with so many blocks."""
        scheme_bits = 8 if self.scheme == "int8" else 6
        matrix_bits = self.matrix_bits or scheme_bits
        parts = name.split(".")
        if parts[-2:] == ["tok_emb", "weight"]:
            return self.embed_bits or scheme_bits
        if parts[0] == "blocks" and self.outer_layers:
            layer = int(parts[1])
            if min(layer, num_layers - 1 - layer) < self.outer_layers:
                return self.outer_bits
        if "attn" in parts:
            return self.attn_bits or matrix_bits
        if "mlp" in parts:
            return self.mlp_bits or matrix_bits
        return matrix_bits


CODEC_LEVELS = {"zlib": (0, 9), "brotli": (0, 11), "lzma": (0, 9), "zstd": (1, 22)}
"""Lowest and highest effort of each entropy coder."""


class CompressConfig(Settings):
    """How quantised weights become bytes."""

    codec: Literal["zlib", "brotli", "lzma", "zstd"] = "zlib"
    """Entropy coder."""
    level: Annotated[int, Field(ge=0, le=22)] = 9
    """Effort: 0..9 for zlib and lzma, 0..11 for brotli, 1..22 for zstd."""
    byte_shuffle: bool = False
    """Group bytes of equal significance before coding."""

    @model_validator(mode="after")
    def _level_exists(self) -> Self:
        faults = []
        lowest, highest = CODEC_LEVELS[self.codec]
        if self.level > highest:
            faults.append(
                f"compress.level = {self.level} is above {highest}, the highest of {self.codec}; "
                "lower it"
            )
        elif self.level < lowest:
            faults.append(
                f"compress.level = {self.level} is below {lowest}, the lowest of {self.codec}; "
                "raise it"
            )
        return _raise_together(self, faults)


class EvaluateConfig(Settings):
    """How bits per byte are measured at the end."""

    seq_len: PositiveInt = 1024
    """Tokens per evaluation row; the number of scored tokens depends on it."""
    batch_tokens: PositiveInt = 524_288
    """Tokens per forward pass of one worker."""
    prequant: bool = True
    """Also score the weights before quantisation; a diagnostic outside every budget."""
    stride: Annotated[int, Field(ge=0)] = 0
    """Step of sliding windows of seq_len tokens: every window but the first scores only its last
    `stride` targets, so that each has at least seq_len - stride tokens before it. Time grows by
    seq_len / stride. 0 = off: rows side by side, as stride = seq_len."""
    stages: bool = False
    """Also score the artifact in plain rows when the score is made otherwise; a diagnostic outside
    every budget."""
    naive_ttt_epochs: Annotated[int, Field(ge=0)] = 0
    """Passes of SGD over the validation text before it is scored, as #675 did; 0 = off. Illegal on
    the golf tracks."""
    naive_ttt_lr: PositiveFloat = 0.002
    """Learning rate of that SGD."""
    naive_ttt_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of that SGD."""
    ngram_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a hashed n-gram cache in the target's probability (#659 0.15, #675 0.3); 0 = off.
    Illegal on the golf tracks."""
    ngram_order: Annotated[int, Field(ge=2)] = 5
    """Tokens of an n-gram: ngram_order - 1 of context and the target."""
    ngram_min_count: PositiveInt = 3
    """Times that a context must have been seen for the cache to speak."""
    ngram_min_confidence: Fraction = 0.5
    """Share of the target among the context's continuations for the cache to speak."""
    ngram_buckets: PositiveInt = 4_194_304
    """Counters of the cache; n-grams that fall into one are taken for one."""
    ngram_never_lower: bool = False
    """Take the cache only where it helps, max(p, p'), as #675 did."""

    @model_validator(mode="after")
    def _every_target_is_scored(self) -> Self:
        faults = []
        if self.stride > self.seq_len:
            faults.append(
                f"evaluate.stride = {self.stride} is above evaluate.seq_len = {self.seq_len}: "
                "targets between windows would not be scored; lower it, or 0 for plain rows"
            )
        return _raise_together(self, faults)

    @property
    def method(self) -> str:
        """What the score is made with, in the words of TrainResult.stages."""
        parts = {
            "sliding": self.stride > 0,
            "naive_ttt": self.naive_ttt_epochs > 0,
            "ngram": self.ngram_weight > 0,
        }
        return "+".join(name for name, is_on in parts.items() if is_on) or "quantized"

    def plain(self) -> EvaluateConfig:
        """The same rows without anything that adds to a plain forward pass: for diagnostics."""
        return self.model_copy(update={"stride": 0, "naive_ttt_epochs": 0, "ngram_weight": 0.0})


class BudgetConfig(Settings):
    """The limits a run must keep. Filled from a track; None = no limit."""

    train_seconds: PositiveFloat | None = 600.0
    """Seconds of training on the run's own hardware, calibration included."""
    eval_seconds: PositiveFloat | None = 600.0
    """Seconds for everything that produces the score."""
    artifact_bytes: PositiveInt | None = 16_000_000
    """Packed code plus packed model."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps."""
    min_steps: Annotated[int, Field(ge=0)] = 0
    """Fewer steps within train_seconds than this make the run worthless; 0 = off."""


class LossConfig(Settings):
    """What training minimises. Scores are always the plain cross-entropy."""

    kind: Literal["cross_entropy", "mile", "entropy", "entropy_published"] = "cross_entropy"
    """"mile": tokens predicted with certainty count less, (1 - exp(-entropy))^gamma. "entropy":
    uncertain tokens count more, weights of mean 1. "entropy_published": the same without that
    normalisation, which inflates the loss and with it the step."""
    mile_gamma: Annotated[float, Field(ge=0)] = 0.75
    """Peak of MiLe's exponent, which follows the budget in a triangle from 0 to 0."""
    mile_clamp_min: Fraction = 0.2
    """Smallest weight of a token under MiLe."""
    mile_peak_frac: Fraction = 0.4
    """Share of the budget at which MiLe's exponent peaks."""


class AverageConfig(Settings):
    """An average of the weights along the run, in fp32, in place of the last weights."""

    kind: Literal["none", "ema", "swa", "lawa"] = "none"
    """"ema": exponential average over every step. "swa": mean of the weights at every interval-th
    step. "lawa": mean of the last `keep` such snapshots and the final weights."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.997
    """What remains of EMA after a step. It remembers about 1 / (1 - decay) steps: lower it for
    runs that are not much longer."""
    interval: PositiveInt = 50
    """Steps between the snapshots of SWA and LAWA."""
    keep: Annotated[int, Field(ge=0)] = 0
    """Snapshots that LAWA keeps, each as large as the model; 0 = all."""
    start: Fraction = 0.0
    """Share of the budget after which the average begins."""

    @model_validator(mode="after")
    def _it_begins(self) -> Self:
        faults = []
        if self.kind != "none" and self.start == 1:
            faults.append(
                f'average.kind = "{self.kind}" would never begin at average.start = 1; lower it, '
                'or set average.kind = "none"'
            )
        return _raise_together(self, faults)


class RuntimeConfig(Settings):
    """How, not what: nothing here should change a result beyond rounding. Outside the digest,
    except seed and dtype."""

    seed: int = 1337
    """Seeds initial weights and every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" = cuda where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of matrix products; "auto" = bfloat16 on cuda, float32 on cpu."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention backend; "auto" picks and says what it took."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; "auto" = on for cuda."""
    prime_steps: Annotated[int, Field(ge=0)] = 3
    """Real steps before the clock starts, so that every graph is compiled; undone afterwards."""
    log_every: PositiveInt = 10
    """Steps between metric records."""
    val_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations outside the clock; 0 = only at the end."""


class TrainConfig(Settings):
    """One training run, complete."""

    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    compress: CompressConfig = CompressConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig = BudgetConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    loss: LossConfig = LossConfig()
    average: AverageConfig = AverageConfig()

    @model_validator(mode="after")
    def _schedule_has_a_budget(self) -> Self:
        faults = []
        if self.schedule.progress == "clock" and self.budget.train_seconds is None:
            faults.append(
                'schedule.progress = "clock" needs budget.train_seconds; set it, or set '
                'schedule.progress = "steps" and budget.max_steps'
            )
        if self.schedule.progress == "steps" and self.budget.max_steps is None:
            faults.append('schedule.progress = "steps" needs budget.max_steps; set it')
        if self.evaluate.batch_tokens < self.evaluate.seq_len:
            faults.append(
                f"evaluate.batch_tokens = {self.evaluate.batch_tokens} is less than one row of "
                f"evaluate.seq_len = {self.evaluate.seq_len}; raise it"
            )
        longest_row = max(self.data.seq_len, self.evaluate.seq_len)
        if self.model.window > longest_row:
            faults.append(
                f"model.window = {self.model.window} is above {longest_row}, the longest row of "
                "data.seq_len and evaluate.seq_len; lower it, or set 0 and model.window_layers = "
                '""'
            )
        faults.extend(self._calibration_faults())
        return _raise_together(self, faults)

    def _calibration_faults(self) -> list[str]:
        seconds, reserve = self.budget.train_seconds, self.quantize.reserve_seconds
        if self.quantize.method != "gptq" or seconds is None:
            return []
        if reserve == 0:
            return [
                'quantize.method = "gptq" calibrates inside budget.train_seconds = '
                f"{seconds:g} and quantize.reserve_seconds = 0 keeps no time for it; set "
                "quantize.reserve_seconds (published runs took 4 to 14)"
            ]
        if reserve >= seconds:
            return [
                f"quantize.reserve_seconds = {reserve:g} leaves nothing of budget.train_seconds = "
                f"{seconds:g} to train in; lower it"
            ]
        return []

    @property
    def step_seconds(self) -> float | None:
        """Seconds in which training steps may run: budget.train_seconds less the reserve for
        calibration. None = no limit."""
        seconds = self.budget.train_seconds
        if seconds is None or self.quantize.method != "gptq":
            return seconds
        return seconds - self.quantize.reserve_seconds

    def with_overrides(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """A copy with dotted paths replaced, fully validated.

        Raises ConfigError that lists every unknown path (with the nearest names), every wrong type
        and every broken rule together.
        """
        faults = [_unknown_path(path) for path in overrides if path not in _leaf_paths()]
        known = {path: value for path, value in overrides.items() if path in _leaf_paths()}
        try:
            changed = TrainConfig.model_validate(_replaced(self, known))
        except ValidationError as error:
            faults.extend(describe_faults(error))
            # pydantic checks cross-field rules only where every field has its type: put the
            # mistyped ones back and look again, so that one error lists both kinds.
            mistyped = {".".join(str(part) for part in fault["loc"]) for fault in error.errors()}
            rest = {path: value for path, value in known.items() if path not in mistyped}
            try:
                TrainConfig.model_validate(_replaced(self, rest))
            except ValidationError as more:
                faults.extend(line for line in describe_faults(more) if line not in faults)
        if faults:
            raise ConfigError("\n".join(faults))
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `TrainConfig.from_dict` inverts it exactly."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> TrainConfig:
        """Inverse of to_dict. Raises ConfigError with every fault."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(describe_faults(error))) from None

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted path."""
        return dict(_walk(self.to_dict()))

    def difference(self, base: TrainConfig) -> dict[str, Any]:
        """The settings, by dotted path, in which this run differs from `base`."""
        other = base.flat()
        return {path: value for path, value in self.flat().items() if other[path] != value}

    def digest(self) -> str:
        """16 hex digits that name what the run computes: equal digests, equal runs.

        Leaves out where the data lies and how the run is executed (data.dir, runtime.* except seed
        and dtype), so that the same trial on another machine keeps its name.
        """
        tree = self.to_dict()
        del tree["data"]["dir"]
        tree["runtime"] = {key: tree["runtime"][key] for key in ("seed", "dtype")}
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_overrides(pairs: list[str]) -> dict[str, object]:
    """["optim.matrix_lr=0.02"] -> {"optim.matrix_lr": 0.02}; values are JSON, else plain strings.

    Raises ConfigError naming every pair without "=".
    """
    broken = [pair for pair in pairs if "=" not in pair]
    if broken:
        raise ConfigError("\n".join(f"--set {pair}: write it as PATH=VALUE" for pair in broken))
    overrides: dict[str, object] = {}
    for pair in pairs:
        path, _, text = pair.partition("=")
        try:
            overrides[path] = json.loads(text)
        except json.JSONDecodeError:
            overrides[path] = text
    return overrides


def describe_faults(error: ValidationError) -> list[str]:
    """One line per fault of a pydantic error, each starting with the dotted path."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "value_error":
            lines.extend(str(fault["ctx"]["error"]).split("\n"))
        elif fault["type"] == "extra_forbidden":
            lines.append(_unknown_path(path))
        else:
            lines.append(
                f"{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
            )
    return lines


def _unknown_path(path: str) -> str:
    paths = _leaf_paths()
    near = difflib.get_close_matches(path, paths, n=3, cutoff=0.5)
    leaf = path.split(".")[-1]
    near += [p for p in paths if p.split(".")[-1] == leaf and p not in near]
    hint = f"did you mean {', '.join(near)}?" if near else "see `caddie train --help`"
    return f"{path}: no such setting; {hint}"


def _leaf_paths() -> list[str]:
    return [path for path, _ in _walk(TrainConfig().model_dump())]


def _replaced(config: TrainConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.model_dump()
    for path, value in values.items():
        *groups, leaf = path.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = value
    return tree


def _walk(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
