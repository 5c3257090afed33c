"""What pr1894 and frontier share: 8192 pieces, 17 visits of 11 layers, MuonEq-R, GPTQ with SDClip.

Each of them is this with overrides, so that its file lists what it has of its own.
"""

from trainer.config import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    QuantizeConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

WORKER_TOKENS = 98_304
"""Tokens of a step on each of eight workers: 48 rows of 2048."""


def april() -> TrainConfig:
    """The common part; no published run by itself."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=8192,
            num_layers=11,
            model_dim=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_mult=4.0,
            leaky_slope=0.5,
            matrix_init="orthogonal",
            ln_scale=True,
            gated_skips=True,
            rope_dims=16,
            recur_visits=3,
            recur_first=3,
            recur_last=5,
        ),
        optim=OptimConfig(
            scalar_lr=0.02,
            tied_embed_lr=0.03,
            muon_row_normalize=True,
            muon_momentum_warmup_start=0.92,
            weight_decay=0.095,
            scalar_weight_decay=0.02,
            embed_weight_decay=0.085,
            grad_clip_norm=0.3,
        ),
        schedule=ScheduleConfig(warmdown="fraction"),
        data=DataConfig(
            seq_len=2048, batch_tokens=8 * WORKER_TOKENS, micro_batch_tokens=WORKER_TOKENS
        ),
        quantize=QuantizeConfig(
            scheme="int6", method="gptq", reserve_seconds=12.0, clip="sigma", clip_sigmas=12.85
        ),
        compress=CompressConfig(codec="brotli", level=11, byte_shuffle=True, code="script"),
        evaluate=EvaluateConfig(seq_len=2048, batch_tokens=524_288),
        runtime=RuntimeConfig(log_every=10),
    )
