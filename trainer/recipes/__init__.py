"""Published runs as full configurations, one module each, in one visible table."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.recipes.frontier import frontier
from trainer.recipes.golf_baseline import golf_baseline
from trainer.recipes.pr675 import pr675
from trainer.recipes.pr1212 import pr1212
from trainer.recipes.pr1894 import pr1894
from trainer.recipes.slowrun_pr78 import slowrun_2h, slowrun_cpu, slowrun_gpu, slowrun_pr78
from trainer.recipes.tiny import tiny


@dataclass(frozen=True)
class Recipe:
    """A named configuration and where it comes from."""

    name: str
    source: str
    """Paper, pull request or script that it reproduces."""
    techniques: tuple[str, ...]
    """What is switched on, in the field's words."""
    track: str
    """Name of the track whose budgets it was made for."""
    build: Callable[[], TrainConfig]


SLOWRUN = (
    "SwiGLU",
    "values from the embedding",
    "scalar U-Net skips",
    "attention gates",
    "window attention",
    "dropout",
    "stochastic depth",
    "multi-token prediction",
    "recurrence",
    "Polar Express",
    "equal neurons",
    "cautious decay",
    "cycles at the end",
    "interleaved heads",
    "checkpoint ensembles",
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "tiny",
            "ours: the same code at a size two CPU cores train in seconds",
            ("GQA", "U-Net skips", "Muon", "int6", "byte shuffle", "brotli"),
            "laptop",
            tiny,
        ),
        Recipe(
            "golf_baseline",
            "openai/parameter-golf train_gpt.py (1.2244 on 8xH100)",
            ("GQA", "relu^2", "U-Net skips", "residual mix", "Muon", "warmdown", "int8", "zlib"),
            "golf-10min-16mb",
            golf_baseline,
        ),
        Recipe(
            "pr675",
            "parameter-golf #675 (1.2302 on one H100)",
            ("LeakyReLU(0.5)^2", "LAWA", "ramping weight decay", "int8", "lzma"),
            "golf-10min-16mb",
            pr675,
        ),
        Recipe(
            "pr1212",
            "parameter-golf #1212 (1.1108 on 8xH100, five seeds)",
            (
                "window attention",
                "mixed row lengths",
                "split learning rates",
                "parallel Muon",
                "MiLe loss",
                "EMA",
                "LeakyReLU(0.5)^2",
                "gated skips",
                "backout",
                "BigramHash",
                "value embeddings",
                "SmearGate",
                "LN scale",
                "XSA",
                "partial RoPE",
                "GPTQ int6",
                "byte shuffle",
                "brotli",
                "sliding evaluation",
            ),
            "golf-10min-16mb",
            pr1212,
        ),
        Recipe(
            "pr1894",
            "parameter-golf #1894 (1.0996 on 8xH100, one seed)",
            (
                "recurrence",
                "recurrence from 0.42 of the clock",
                "RECUR_AB",
                "parallel residuals",
                "LeakyReLU(0.5)^2",
                "gated skips",
                "LN scale",
                "layer scale",
                "partial RoPE",
                "MuonEq-R",
                "QAT-lite",
                "GPTQ int6",
                "SDClip",
                "compact artifact",
                "byte shuffle",
                "brotli",
                "sliding evaluation",
                "score-first test-time training",
            ),
            "golf-10min-16mb",
            pr1894,
        ),
        Recipe(
            "frontier",
            "parameter-golf #1855, the last accepted record (1.0611 on 8xH100, three seeds)",
            (
                "recurrence",
                "two-lane residuals",
                "sparse attention gates",
                "XSA",
                "SmearGate",
                "document attention",
                "LeakyReLU(0.5)^2",
                "gated skips",
                "LN scale",
                "partial RoPE",
                "MuonEq-R",
                "Polar Express",
                "parallel Muon",
                "EMA",
                "GPTQ int6",
                "int7 embedding",
                "SDClip",
                "LQER",
                "byte shuffle",
                "brotli",
                "phased LoRA test-time training",
            ),
            "golf-10min-16mb",
            frontier,
        ),
        Recipe(
            "slowrun_pr78",
            "slowrun #78 (3.193 nats of GPT-2 tokens, two runs, on 8xH100)",
            SLOWRUN,
            "slowrun-2h",
            slowrun_pr78,
        ),
        Recipe(
            "slowrun_2h",
            "slowrun, its two-hour record of 2026-07-02 (3.139 nats of GPT-2 tokens, on 8xH100)",
            (
                *(name for name in SLOWRUN if name != "interleaved heads"),
                "fused heads",
                "document shuffle",
                "window curriculum",
                "YaRN",
                "MuonEq-R",
            ),
            "slowrun-2h",
            slowrun_2h,
        ),
        Recipe(
            "slowrun_gpu",
            "ours: slowrun_pr78 at a size one GPU trains in minutes",
            SLOWRUN,
            "slowrun-tiny",
            slowrun_gpu,
        ),
        Recipe(
            "slowrun_cpu",
            "ours: slowrun_pr78 at a size a CPU trains in seconds",
            SLOWRUN,
            "laptop",
            slowrun_cpu,
        ),
    )
}
