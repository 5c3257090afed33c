"""parameter-golf #1894: three middle blocks visited three times, blended with their last output.

1.0996 bits per byte on 8xH100 (one seed, 599 s, 15,974,435 bytes): 1.1046 after training, 1.1336
after quantisation, the rest by test-time training. Its base is #1493. Schedules are shares of the
budget; the momentum's warm-up counts 1500 steps as published, of about 4000.

Where this departs from what was published, and how to replay that:

- Weight decay does not pull at the blend, whose rest is a = 1: optim.recur_weight_decay = 0.02. The
  script's decay acts from the first step on, long before the blend is used.
- Calibration is inside the clock, and what it reads is shared out over the workers. The script
  calibrates after the clock, 64 batches on every worker, and uses one worker's.
- QAT-lite takes the sum over a matrix, which acts; the script's mean has a gradient that vanishes:
  qat_lite.reduction = "mean".
- The embedding is trained in 32 bits, and gradients of a batch are averaged in them.

model.recur_skips = "plain" is as published: three of the eight outputs of the longer first half go
nowhere; "all" uses them. What else its author tried, each a switch: schedule.recur_start = 0.35 and
0.4, model.recur_blend = "alpha", model.recur_lora_rank = 4, model.xsa_last_n = 4, model.attn_gate =
"biased" with model.attn_gate_bias_init = 1.
"""

from trainer.config import (
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    QatLiteConfig,
    QuantizeConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

PUBLISHED_STEPS = 4000
"""Steps in the published time, by the step times that its author reports: 4,860 without recurrence,
3,886 with it from 0.35 on; here it begins at 0.42."""
WORKER_TOKENS = 98_304
"""Tokens of a step on each of eight workers: 48 rows."""


def pr1894() -> TrainConfig:
    """11 layers, width 512, 17 visits, 8192 pieces, GPTQ int6 + brotli."""
    return TrainConfig(
        model=_model(),
        optim=_optim(),
        schedule=ScheduleConfig(warmdown="fraction", warmdown_frac=0.72, recur_start=0.42),
        data=DataConfig(
            seq_len=2048,
            batch_tokens=8 * WORKER_TOKENS,
            micro_batch_tokens=WORKER_TOKENS,
            loader="sequential",
        ),
        quantize=QuantizeConfig(
            scheme="int6",
            embed_bits=8,
            method="gptq",
            calibration="train",
            calibration_tokens=64 * WORKER_TOKENS,
            reserve_seconds=12.0,
            damping=0.01,
            act_order=True,
            clip="sigma",
            clip_sigmas=12.85,
            embed_clip_sigmas=20.0,
            control_bits=8,
            scale_bits=8,
        ),
        compress=CompressConfig(codec="brotli", level=11, byte_shuffle=True),
        evaluate=EvaluateConfig(
            seq_len=2048,
            stride=64,
            batch_tokens=524_288,
            ttt="chunks",
            ttt_chunk_tokens=32_768,
            ttt_epochs=3,
            ttt_lr=0.005,
            ttt_momentum=0.9,
        ),
        runtime=RuntimeConfig(seed=1337, log_every=10),
        qat_lite=QatLiteConfig(
            kind="squared",
            strength=0.02,
            bits=6,
            clip_sigmas=12.85,
            targets="qk",
            first_layer=7,
            start=0.55,
            every=4,
        ),
    )


def _model() -> ModelConfig:
    return ModelConfig(
        vocab_size=8192,
        num_layers=11,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=4.0,
        qk_gain_init=5.25,
        leaky_slope=0.5,
        matrix_init="orthogonal",
        ln_scale=True,
        layer_scale=True,
        gated_skips=True,
        rope_dims=16,
        recur_visits=3,
        recur_first=3,
        recur_last=5,
        recur_skips="plain",
        recur_blend="ab",
        recur_a_init=1.0,
        recur_b_init=0.0,
        parallel="joint",
        parallel_start=7,
    )


def _optim() -> OptimConfig:
    return OptimConfig(
        matrix_lr=0.022,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        muon_row_normalize=True,
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_frac=1500 / PUBLISHED_STEPS,
        muon_backend_steps=5,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.095,
        scalar_weight_decay=0.02,
        embed_weight_decay=0.085,
        grad_clip_norm=0.3,
    )
