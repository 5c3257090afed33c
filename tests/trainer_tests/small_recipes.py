"""What makes small copies of the published recipes: every technique, seconds on a CPU."""

from typing import Any

COMMON: dict[str, Any] = {
    "evaluate.batch_tokens": 768,
    "schedule.progress": "steps",
    "budget.train_seconds": None,
}
SMALL: dict[str, dict[str, Any]] = {
    "pr675": {
        **COMMON,
        "model.num_layers": 4,
        "model.model_dim": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "data.seq_len": 32,
        "data.batch_tokens": 512,
        "data.micro_batch_tokens": 256,
        "evaluate.seq_len": 32,
        "average.interval": 3,
        "budget.max_steps": 24,
        "quantize.keep_float_max_numel": 512,
    },
    "pr1212": {
        **COMMON,
        "model.num_layers": 4,
        "model.model_dim": 32,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.backout_layer": 2,
        "model.bigram_buckets": 64,
        "model.bigram_dim": 8,
        "model.value_embed_dim": 8,
        "model.value_embed_layers": "1,3",
        "model.window": 8,
        "model.window_layers": "2",
        "model.xsa_last_n": 2,
        "model.rope_dims": 4,
        "model.rope_ntk_len": 16,
        "data.seq_len": 32,
        "data.mix": "5x32+3x96",
        "data.batch_tokens": 8 * 96,
        "data.micro_batch_tokens": 96,
        "evaluate.seq_len": 96,
        "evaluate.stride": 24,
        "average.decay": 0.8,
        "budget.max_steps": 24,
        "quantize.calibration_tokens": 1024,
        "quantize.keep_float_max_numel": 512,
    },
}
