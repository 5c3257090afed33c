"""parameter-golf #1212: windows on every second layer, rows of two lengths within a step.

1.1108 bits per byte on 8xH100 (five seeds, 8,428 steps of 69.6 ms, 15,726,762 bytes). Published
schedules count steps; here they are the same shares of the budget, so that they mean the same on
other hardware. Decay of the average counts steps still: lower `average.decay` (or switch
`average.kind` off) for a run of less than a few thousand.

Where this departs from what was published, and how to replay that:

- The step has 589,824 tokens, as the command says, the same number for each of eight workers. What
  ran was data.mix = "5x2048@36+3x6144@10", data.batch_tokens = 552960, data.mix_weighting =
  "worker".
- SmearGate and hashed bigrams do not look across document starts (model.mask_documents).
- Gradients are clipped to the norm over all workers, not by each worker to its own.
- Calibration reads 32 workers' batches and shares them out. The script read 256 on every worker and
  used one worker's: quantize.calibration_tokens = 18874368.

What its text names and its code does not do: residual lambdas (29,751,910 parameters leave no room
for them; model.resid_lambda_init = 1.0488 adds 24), SWA, which is collected and never used, and
training on rounded weights late in the run, which the compiler had folded away.
"""

from trainer.config import (
    AverageConfig,
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    QuantizeConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)

PUBLISHED_STEPS = 8428
"""Steps of the published run in its 586 s (600 less the reserve for calibration)."""
WORKER_TOKENS = 73_728
"""Tokens of a step on each of eight workers: 36 rows of 2048, 18 of 4096, 12 of 6144, 9 of 8192."""


def pr1212() -> TrainConfig:
    """12 layers, width 512, windows of 512, 1024 pieces, GPTQ int6 + brotli."""
    return TrainConfig(
        model=_model(),
        optim=_optim(),
        schedule=ScheduleConfig(warmdown="fraction", warmdown_frac=4000 / PUBLISHED_STEPS),
        data=DataConfig(
            seq_len=2048,
            mix="5x2048+3x6144",
            batch_tokens=8 * WORKER_TOKENS,
            micro_batch_tokens=WORKER_TOKENS,
            loader="coprime",
        ),
        quantize=_quantize(),
        compress=CompressConfig(codec="brotli", level=11, byte_shuffle=True, code="script"),
        evaluate=EvaluateConfig(seq_len=6144, stride=128, batch_tokens=8 * WORKER_TOKENS),
        runtime=RuntimeConfig(seed=1337, log_every=10),
        loss=LossConfig(kind="mile", mile_gamma=0.75, mile_clamp_min=0.2, mile_peak_frac=0.4),
        average=AverageConfig(kind="ema", decay=0.997),
    )


def _model() -> ModelConfig:
    return ModelConfig(
        vocab_size=1024,
        num_layers=12,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=3.0,
        qk_gain_init=2.5,
        leaky_slope=0.5,
        matrix_init="orthogonal",
        ln_scale=True,
        gated_skips=True,
        backout_layer=7,
        backout_init=0.1,
        bigram_buckets=5120,
        bigram_dim=128,
        smear="channel",
        value_embed_dim=128,
        value_embed_layers="5,9,10",
        window=512,
        window_layers="even_but_first",  # 2, 4, 6, 8, 10
        xsa_last_n=7,
        rope_dims=16,
        rope_ntk_len=1024,
    )


def _optim() -> OptimConfig:
    return OptimConfig(
        matrix_lr=0.024,
        matrix_lr_late=0.019,
        scalar_lr=0.020,
        scalar_lr_late=0.038,
        tied_embed_lr=0.022,
        muon_momentum=0.985,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_frac=1500 / PUBLISHED_STEPS,
        muon_comm="reduce_scatter",
        weight_decay=0.04,
        scalar_weight_decay=0.04,
        embed_weight_decay=0.04,
        grad_clip_norm=0.3,
    )


def _quantize() -> QuantizeConfig:
    """6 bits for the matrices of the blocks and 8 for tables, which the published code chooses by
    name. The floor of the scales is one step of the largest code: coarse, and what keeps 29.8
    million weights under the cap; with scales that follow the weights they are a fifth over."""
    return QuantizeConfig(
        scheme="int8",
        attn_bits=6,
        mlp_bits=6,
        clip="search",
        floor_by_levels=True,
        method="gptq",
        calibration="train",
        calibration_tokens=32 * WORKER_TOKENS,
        reserve_seconds=14.0,
        damping=0.01,
        act_order=True,
    )
