"""Settings of the artifact: from weights to small integers, from those to bytes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together

Bits = Literal[0, 4, 5, 6, 7, 8]
Sigmas = Annotated[float, Field(ge=0)]
HESSIAN_CLIPS = ("hessian_sigma", "hessian_search")
SIGMA_CLIPS = ("sigma", *HESSIAN_CLIPS)


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
    outer_bits: Literal[4, 5, 6, 7, 8] = 8
    """Bits of the matrices of the outer blocks."""
    clip: Literal["percentile", "search", "sigma", "hessian_sigma", "hessian_search"] = "percentile"
    """"percentile": clip_percentile for every row. "search": of five percentiles from 99.9 to 100,
    each row takes the one with the least squared error. "sigma": so many standard deviations of the
    row (SDClip, parameter-golf #1394). "hessian_sigma": wider for rows with more to lose (#1412).
    "hessian_search": each matrix takes the width with the least error on its inputs (HQClip)."""
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

    qk_bits: Bits = 0
    """Bits of the query and key matrices; 0 = as the other matrices of attention."""
    clip_sigmas: PositiveFloat = 12.85
    """Clip of the rules that count in standard deviations. After entropy coding it sets the size,
    not the width of the codes."""
    embed_clip_sigmas: Sigmas = 0.0
    """Of the token embedding (published: 20 at 8 bits, 14 at 7); 0 = clip_sigmas."""
    attn_clip_sigmas: Sigmas = 0.0
    """Of the matrices of attention; 0 = clip_sigmas."""
    mlp_clip_sigmas: Sigmas = 0.0
    """Of the matrices of the MLPs; 0 = clip_sigmas."""
    qk_clip_sigmas: Sigmas = 0.0
    """Of the query and key matrices; 0 = as the other matrices of attention."""
    hessian_clip_lambda: Fraction = 0.175
    """How far clip = "hessian_sigma" moves a row's clip with its weight on the inputs; 0 = not at
    all, as "sigma"."""
    clip_search_low: PositiveFloat = 0.85
    """Least width that clip = "hessian_search" tries, as a multiple of the sigmas."""
    clip_search_high: PositiveFloat = 1.15
    """Largest width that it tries."""
    clip_search_points: PositiveInt = 7
    """Widths that it tries, evenly spaced."""
    awq_groups: Annotated[int, Field(ge=0, le=9999)] = 0
    """Groups of neighbouring columns that keep 8 bits, the best by inputs times weights of all
    matrices with fewer (AWQ-lite, parameter-golf #1908, with 1); 0 = off. Needs method = "gptq"."""
    awq_group_size: Annotated[int, Field(gt=0, le=9999)] = 64
    """Columns of such a group."""
    low_rank: Literal["off", "float16", "asymmetric"] = "off"
    """Factors that make up for what rounding took from the worst matrices. "float16": QRES
    (parameter-golf #1894). "asymmetric": 2 and 4 bits, LQER (#1797)."""
    low_rank_rank: Annotated[int, Field(gt=0, le=9999)] = 4
    """Rank of the factors (QRES: 1)."""
    low_rank_top_k: Annotated[int, Field(ge=0)] = 3
    """So many matrices, those with the largest error, have factors; 0 = all."""
    low_rank_group: Annotated[int, Field(gt=0, le=9999)] = 64
    """Numbers of the second factor that share a scale, for "asymmetric"."""
    low_rank_targets: Literal["all", "qk"] = "all"
    """Matrices that may have factors: every coded one, or queries and keys (QRES)."""
    low_rank_from_layer: Annotated[int, Field(ge=0)] = 0
    """First block whose matrices may have factors (QRES: 7); above 0 it leaves out what is in no
    block."""
    gate_bits: Literal[0, 8] = 0
    """Bits of matrices with "gate" in their names, per row and whatever their size; 0 = as their
    size says. What is a control tensor stays one."""
    control_bits: Literal[0, 8] = 0
    """Bits of control tensors of at least 128 elements, one scale each; 0 = 32-bit floats."""
    scale_bits: Literal[8, 16] = 16
    """16: the scales of rows are fp16. 8: whole multiples of one fp16 step a tensor."""
    allocate: Literal["off", "rate_distortion"] = "off"
    """"rate_distortion": after training, every coded matrix gets the step, and with it bits and
    clip, that lets the loss grow least within budget.artifact_bytes, which the artifact then fills.
    Takes the place of bits and clips set here; needs method = "gptq"."""
    allocate_tokens: PositiveInt = 262_144
    """Training tokens over all workers on which the loss's sensitivity to each matrix is measured,
    with backward passes; counts as calibration."""
    prune_to_fit: bool = False
    """Where the artifact is over budget.artifact_bytes, its cheapest codes of 1 and -1 become 0
    until it is not. Packs some times over."""

    @model_validator(mode="after")
    def _inputs_are_known(self) -> Self:
        faults = []
        if self.clip in HESSIAN_CLIPS and self.method != "gptq":
            faults.append(
                f'quantize.clip = "{self.clip}" needs the inputs of the matrices, which quantize.'
                f'method = "{self.method}" does not collect; set it to "gptq", or quantize.clip to '
                '"sigma"'
            )
        if self.clip in HESSIAN_CLIPS and self.qat_start < 1:
            faults.append(
                f"quantize.qat_start = {self.qat_start:g} needs the artifact's grid while training "
                f'goes on, and quantize.clip = "{self.clip}" knows it only after calibration; set '
                'quantize.clip to "sigma", or quantize.qat_start = 1'
            )
        if self.awq_groups and self.method != "gptq":
            faults.append(
                f"quantize.awq_groups = {self.awq_groups} needs the inputs of the matrices, which "
                f'quantize.method = "{self.method}" does not collect; set it to "gptq", or '
                "quantize.awq_groups = 0"
            )
        if self.allocate != "off":
            faults.extend(self._allocation_faults())
        if self.clip_search_low > self.clip_search_high:
            faults.append(
                f"quantize.clip_search_low = {self.clip_search_low:g} is above "
                f"quantize.clip_search_high = {self.clip_search_high:g}; swap them"
            )
        return raise_together(self, faults)

    def _allocation_faults(self) -> list[str]:
        named = f'quantize.allocate = "{self.allocate}"'
        faults = []
        if self.method != "gptq":
            faults.append(
                f"{named} needs the inputs of the matrices, which quantize.method = "
                f'"{self.method}" does not collect; set it to "gptq"'
            )
        if self.qat_start < 1:
            faults.append(
                f"quantize.qat_start = {self.qat_start:g} needs the artifact's grid while training "
                f"goes on, and {named} knows it only afterwards; set quantize.qat_start = 1"
            )
        if self.awq_groups:
            faults.append(
                f"quantize.awq_groups = {self.awq_groups}: {named} has one step for a row; set it "
                "to 0"
            )
        if self.prune_to_fit:
            faults.append(f"quantize.prune_to_fit = true: {named} fits by itself; set it to false")
        return faults

    def bits_of(self, name: str, num_layers: int) -> int:
        """Bits of the codes of a tensor that is large enough to be coded, by its name in the state
        dict of a model with so many blocks."""
        scheme_bits = 8 if self.scheme == "int8" else 6
        matrix_bits = self.matrix_bits or scheme_bits
        parts = name.split(".")
        if parts[0] == "blocks" and self.outer_layers:
            layer = int(parts[1])
            if min(layer, num_layers - 1 - layer) < self.outer_layers:
                return self.outer_bits
        attn_bits = self.attn_bits or matrix_bits
        return {
            "embed": self.embed_bits or scheme_bits,
            "qk": self.qk_bits or attn_bits,
            "attn": attn_bits,
            "mlp": self.mlp_bits or matrix_bits,
            "other": matrix_bits,
        }[kind_of(name)]

    def for_tensor(self, name: str) -> QuantizeConfig:
        """The settings with the clip of this tensor's kind as clip_sigmas; small gates keep their
        largest weight on the largest code."""
        if self.gate_bits and "gate" in name:
            return self.model_copy(update={"clip": "percentile", "clip_percentile": 100.0})
        attn_sigmas = self.attn_clip_sigmas or self.clip_sigmas
        sigmas = {
            "embed": self.embed_clip_sigmas or self.clip_sigmas,
            "qk": self.qk_clip_sigmas or attn_sigmas,
            "attn": attn_sigmas,
            "mlp": self.mlp_clip_sigmas or self.clip_sigmas,
            "other": self.clip_sigmas,
        }[kind_of(name)]
        return self.model_copy(update={"clip_sigmas": sigmas})


def takes_low_rank(config: QuantizeConfig, name: str) -> bool:
    """Whether a coded tensor of this name may have low-rank factors."""
    if config.low_rank == "off" or (config.low_rank_targets == "qk" and kind_of(name) != "qk"):
        return False
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" else -1
    return config.low_rank_from_layer == 0 or layer >= config.low_rank_from_layer


def kind_of(name: str) -> Literal["embed", "qk", "attn", "mlp", "other"]:
    """What a tensor is, by its name in the state dict."""
    parts = name.split(".")
    if parts[-2:] == ["tok_emb", "weight"]:
        return "embed"
    if "attn" in parts:
        return "qk" if parts[-2] in ("q", "k") else "attn"
    return "mlp" if "mlp" in parts else "other"


CODEC_LEVELS = {
    "zlib": (0, 9),
    "brotli": (0, 11),
    "lzma": (0, 9),
    "zstd": (1, 22),
    "rans": (0, 11),
    "rans_classes": (0, 11),
}


class CompressConfig(Settings):
    """How quantised weights become bytes."""

    codec: Literal["zlib", "brotli", "lzma", "zstd", "rans", "rans_classes"] = "zlib"
    """Entropy coder. "rans": a range coder for codes without structure, brotli for the others.
    "rans_classes": the same with frequencies for each class of alike rows, in seconds."""
    level: Annotated[int, Field(ge=0, le=22)] = 9
    """Effort: 0..9 for zlib and lzma, 0..11 for brotli (also within "rans" and "rans_classes"),
    1..22 for zstd."""
    byte_shuffle: bool = False
    """Group bytes of equal significance before coding."""
    grouping: Literal["type", "role", "role_transposed", "role_sorted"] = "type"
    """What is coded together. "type": all codes. "role": the codes of one role (query and output,
    key and value, up, down, embedding). "role_transposed": column after column. "role_sorted": also
    rows of embedding, query and up matrices in an order of neighbours, which is stored."""
    code: Literal["modules", "script"] = "modules"
    """What counts as the code of the artifact. "modules": the modules that the run imports.
    "script": the train_gpt.py of `caddie package`, half as large, made after training in about ten
    seconds of one core outside every clock."""

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
        return raise_together(self, faults)
