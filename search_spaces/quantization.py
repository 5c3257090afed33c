"""What follows training, on weights that are trained already: seconds to minutes for a trial.

Give the weights with --set source.checkpoint=PATH (a run with runtime.save_checkpoint = true writes
them); the settings that they were trained with come along. Without, every trial trains the recipe.

Text that the model writes for its calibration takes data.seq_len times the work of as much training
text; on a slow machine such trials break the cap on training seconds, as they would in a record.

Clips are counted in standard deviations throughout but for two rules by percentile, and the level
is one that every codec has.
"""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Space

GPTQ = {"quantize.method": "gptq", "quantize.reserve_seconds": 3.0}

QUANTIZATION = Space(
    name="quantization",
    recipe="tiny",
    track="laptop",
    axes={
        "quantize.method": CategoricalDistribution(["gptq"]),
        "quantize.reserve_seconds": CategoricalDistribution([3.0]),
        "quantize.clip": CategoricalDistribution(
            ["percentile", "search", "sigma", "hessian_sigma", "hessian_search"]
        ),
        "quantize.clip_sigmas": FloatDistribution(4.0, 24.0, log=True),
        "quantize.embed_clip_sigmas": FloatDistribution(4.0, 32.0, log=True),
        "quantize.attn_bits": IntDistribution(4, 8),
        "quantize.mlp_bits": IntDistribution(4, 8),
        "quantize.embed_bits": IntDistribution(5, 8),
        "quantize.calibration": CategoricalDistribution(["train", "self"]),
        "quantize.calibration_tokens": IntDistribution(1024, 8192, log=True),
        "quantize.low_rank": CategoricalDistribution(["off", "asymmetric", "float16"]),
        "quantize.awq_groups": IntDistribution(0, 2),
        "quantize.scale_bits": CategoricalDistribution([16, 8]),
        "compress.codec": CategoricalDistribution(["rans", "brotli", "lzma", "zstd"]),
        "compress.level": IntDistribution(5, 9),
        "compress.grouping": CategoricalDistribution(
            ["type", "role", "role_transposed", "role_sorted"]
        ),
    },
    enqueued=(
        # int8 and percentiles, as the baseline but for GPTQ
        {
            **GPTQ,
            "quantize.calibration": "train",
            "quantize.clip": "percentile",
            "quantize.attn_bits": 8,
            "quantize.mlp_bits": 8,
            "quantize.embed_bits": 8,
            "quantize.low_rank": "off",
            "quantize.awq_groups": 0,
        },
        # parameter-golf #1394
        {
            **GPTQ,
            "quantize.calibration": "train",
            "quantize.clip": "sigma",
            "quantize.clip_sigmas": 12.85,
            "quantize.embed_clip_sigmas": 20.0,
            "quantize.attn_bits": 6,
            "quantize.mlp_bits": 6,
            "quantize.embed_bits": 8,
            "quantize.low_rank": "off",
            "quantize.awq_groups": 0,
            "compress.codec": "brotli",
        },
        # near the last accepted record, #1855
        {
            **GPTQ,
            "quantize.calibration": "train",
            "quantize.clip": "sigma",
            "quantize.clip_sigmas": 12.0,
            "quantize.embed_clip_sigmas": 14.0,
            "quantize.attn_bits": 6,
            "quantize.mlp_bits": 6,
            "quantize.embed_bits": 7,
            "quantize.low_rank": "asymmetric",
            "quantize.awq_groups": 0,
            "compress.grouping": "role_sorted",
        },
        # as small as codes get
        {
            **GPTQ,
            "quantize.calibration": "train",
            "quantize.clip": "hessian_search",
            "quantize.clip_sigmas": 24.0,
            "quantize.embed_clip_sigmas": 32.0,
            "quantize.attn_bits": 4,
            "quantize.mlp_bits": 4,
            "quantize.embed_bits": 5,
        },
    ),
    description="bits, clips, calibration, codec and corrections of weights already trained",
)

ALLOCATION = Space(
    name="allocation",
    recipe="tiny",
    track="laptop",
    axes={
        "quantize.method": CategoricalDistribution(["gptq"]),
        "quantize.reserve_seconds": CategoricalDistribution([3.0]),
        "quantize.allocate": CategoricalDistribution(["off", "rate_distortion"]),
        "quantize.allocate_tokens": IntDistribution(1024, 16_384, log=True),
        "quantize.calibration_tokens": IntDistribution(1024, 16_384, log=True),
        "quantize.low_rank": CategoricalDistribution(["off", "asymmetric", "float16"]),
        "quantize.scale_bits": CategoricalDistribution([16, 8]),
        "compress.codec": CategoricalDistribution(["rans_classes", "rans", "brotli"]),
        "compress.grouping": CategoricalDistribution(["type", "role", "role_transposed"]),
    },
    enqueued=(
        {**GPTQ, "quantize.allocate": "off", "compress.codec": "rans_classes"},
        {**GPTQ, "quantize.allocate": "rate_distortion", "compress.codec": "rans_classes"},
    ),
    description="the bytes of the cap shared out among matrices, of weights already trained",
)
