"""Settings of the artifact: from weights to small integers, from those to bytes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together

Bits = Literal[0, 5, 6, 8]


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
        return raise_together(self, faults)
