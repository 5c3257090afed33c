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
        return _raise_together(self, faults)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)


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

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        faults = []
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
