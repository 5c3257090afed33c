"""What a configuration says of its artifact's bytes before it runs: an account, and its likes.

The account is exact where it can be: every tensor by name and shape, its bits, scales, small
tensors as floats. A code costs the entropy of the quantised distribution, taken as Gaussian with a
row's own standard deviation, times what the codec needs more than entropy. What the account does
not know (weights under a coarse floor, young weights, tails) is the ratio that size_model learns.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

from service.filters.size_model import GROUPS, NUMBERS, SizeFacts
from trainer.account import count_parameters, parameter_table
from trainer.config import CompressConfig, QuantizeConfig, TrainConfig
from trainer.config.quantize import SIGMA_CLIPS

FLOAT_BITS = 16
COARSE_FLOOR = 1 / 256
"""From this scale floor on, small weights share few codes."""
USUAL_STEPS = 20_000
"""The challenge's step limit, which the clock comes before: "no limit" counts as this."""
USUAL_SECONDS = 600.0
EXCESS = {
    "zlib": ((3.3, 1.158), (4.7, 1.099), (5.2, 1.054), (5.3, 1.048), (7.3, 1.011)),
    "brotli fast": ((3.3, 1.179), (4.7, 1.060), (5.2, 1.014), (7.3, 1.006)),
    "brotli": ((3.3, 1.014), (7.3, 1.006)),
    "lzma": ((3.3, 1.059), (4.7, 1.029), (7.3, 1.017)),
    "zstd": ((3.3, 1.018), (7.3, 1.009)),
    "rans": ((3.3, 1.002), (7.3, 1.002)),
}
"""Coded bits over entropy, at bits of entropy a code: a million Gaussian codes through each codec
at its highest level; brotli 11 as docs/techniques/quantization.md measured it."""
FAST_BROTLI = 10
"""Below this level brotli does not model its contexts."""


@lru_cache(maxsize=4096)
def entropy(levels: int, sigmas: float) -> float:
    """Bits of a Gaussian weight in steps of sigmas / levels standard deviations, by its exact
    distribution over the codes -levels .. levels; log2(4.13 levels / sigmas) where steps are fine.
    """
    edges = (np.arange(-levels, levels) + 0.5) * sigmas / levels
    shares = np.diff(np.concatenate([[0.0], ndtr(edges), [1.0]]))
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def expected_clip(columns: int) -> float:
    """Median of the largest |w| of a row of Gaussian weights, in standard deviations."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / columns)) / 2)


def excess(codec: str, bits: float) -> float:
    """What the codec needs over entropy; 1.01 for codecs that are not in EXCESS."""
    points = EXCESS.get(codec, ((3.3, 1.01),))
    return float(np.interp(bits, [at for at, _ in points], [needed for _, needed in points]))


def coded_bits(bits: int, sigmas: float | None, columns: int, codec: str) -> float:
    """Bits that a weight takes in the file.

    Args:
        bits: Width of its code.
        sigmas: Clip in standard deviations; None = a row's largest weight has the largest code.
        columns: Weights of its row.
        codec: As in EXCESS.
    """
    levels = 2 ** (bits - 1) - 1
    found = entropy(levels, sigmas if sigmas is not None else expected_clip(columns))
    return found * excess(codec, found)


def reckoned_bytes(config: TrainConfig) -> float:
    """Bytes of the packed model by account: small tensors as 16-bit floats, the others at the
    entropy of their codes with one scale a row."""
    quantize, codec = config.quantize, _codec(config.compress)
    total = 0.0
    for name, shape in parameter_table(config.model).items():
        numel = math.prod(shape)
        if numel <= quantize.keep_float_max_numel:
            total += FLOAT_BITS * numel
            continue
        sigma = quantize.clip in SIGMA_CLIPS
        sigmas = quantize.for_tensor(name).clip_sigmas if sigma else None
        bits = quantize.bits_of(name, config.model.num_layers)
        total += numel * coded_bits(bits, sigmas, numel // shape[0], codec)
        total += quantize.scale_bits * shape[0]
    return total / 8


def size_facts(config: TrainConfig, recipe: str = "", workers: int = 8) -> SizeFacts:
    """What artifacts of this configuration have in common with others.

    Args:
        recipe: Base recipe, "" where it is not known: then nothing is of its line.
        workers: Devices that train it.
    """
    rule = _rule(config.quantize)
    codes = rule if rule == "sigma" else f"{rule}|int{_matrix_bits(config)}"
    way = f"{codes}|{config.compress.codec}"
    line = f"{recipe}|{way}" if recipe else None
    parts = (config.quantize, config.compress)
    coding = _short([part.model_dump(exclude_defaults=True) for part in parts])
    shape = f"{recipe}|{way}|{count_parameters(config.model)}|{coding}"
    groups = (rule, way, line, shape, _settings(config))
    numbers = {
        "log_budget": math.log((config.budget.train_seconds or USUAL_SECONDS) * workers),
        "log_steps": math.log(config.budget.max_steps or USUAL_STEPS),
        "log_params": math.log(count_parameters(config.model)),
        "log_batch": math.log(config.data.batch_tokens),
        "log_row": math.log(config.data.seq_len),
        **_clips(config.quantize),
    }
    assert len(groups) == len(GROUPS)
    return SizeFacts(groups, tuple(numbers[name] for name in NUMBERS), rule != "floored")


def _matrix_bits(config: TrainConfig) -> int:
    """Of the middle block's MLP: most weights are like it."""
    layers = config.model.num_layers
    return config.quantize.bits_of(f"blocks.{layers // 2}.mlp.up.weight", layers)


def _rule(quantize: QuantizeConfig) -> str:
    if quantize.clip in SIGMA_CLIPS:
        return "sigma"
    coarse = quantize.floor_by_levels or quantize.scale_floor >= COARSE_FLOOR
    return "floored" if coarse else "largest"


def _clips(quantize: QuantizeConfig) -> dict[str, float | None]:
    if quantize.clip not in SIGMA_CLIPS:
        return {"sigmas": None, "embed_sigmas": None, "embed_bits": None}
    return {
        "sigmas": quantize.clip_sigmas,
        "embed_sigmas": quantize.for_tensor("tok_emb.weight").clip_sigmas,
        "embed_bits": float(quantize.bits_of("tok_emb.weight", 1)),
    }


def _codec(compress: CompressConfig) -> str:
    slow = compress.level >= FAST_BROTLI
    return "brotli fast" if compress.codec == "brotli" and not slow else compress.codec


def _settings(config: TrainConfig) -> str:
    """The digest of everything but the seed."""
    return config.with_overrides({"runtime.seed": 0}).digest()


def _short(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
