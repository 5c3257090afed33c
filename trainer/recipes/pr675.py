"""parameter-golf #675: ten layers, averaged late checkpoints, growing weight decay.

1.2012 bits per byte before and 1.2302 after quantisation on one H100 (1,399 steps of 429 ms,
13,472,418 bytes). Published schedules count steps; here they are the same shares of the budget.

The published run trained on validation text (data.train_split = "val"), which is illegal and off
here, so this recipe is not expected to reach that number. So are the two other illegal pieces that
its author tried, evaluate.naive_ttt_epochs = 3 and evaluate.ngram_weight = 0.3 with
evaluate.ngram_never_lower = true. What else was tried and dropped, each a switch:

- model.num_loops with model.lora_rank: shared blocks, told apart by adapters
- model.diff_attention = "full" (or "split", the form that ran)
- model.value_residual = "half"
- loss.kind = "entropy_published" ("entropy" repairs it)
- quantize.qat_start = 0.5
- evaluate.stride = 64
"""

from trainer.config import (
    AverageConfig,
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

PUBLISHED_STEPS = 1399
"""Steps of the published run in its 600 s on one GPU."""
WARMDOWN = 1200 / PUBLISHED_STEPS
"""Share of the budget over which the rate falls."""


def pr675() -> TrainConfig:
    """10 layers, width 512, 1024 pieces, int8 + lzma."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=1024,
            num_layers=10,
            model_dim=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_mult=2.0,
            qk_gain_init=1.5,
            leaky_slope=0.5,
        ),
        optim=OptimConfig(
            matrix_lr=0.04,
            scalar_lr=0.04,
            tied_embed_lr=0.05,
            muon_momentum=0.95,
            muon_momentum_warmup_start=0.85,
            muon_momentum_warmup_frac=500 / PUBLISHED_STEPS,
            weight_decay=0.02,
            weight_decay_ramp=0.06,
        ),
        schedule=ScheduleConfig(warmdown="fraction", warmdown_frac=WARMDOWN),
        data=DataConfig(seq_len=1024, batch_tokens=524_288, micro_batch_tokens=65_536),
        # The baseline's floor: without it ten layers of int8 are over the cap.
        quantize=QuantizeConfig(scheme="int8", clip_percentile=99.99984, floor_by_levels=True),
        compress=CompressConfig(codec="lzma", level=9, code="script"),
        evaluate=EvaluateConfig(seq_len=1024, batch_tokens=524_288),
        runtime=RuntimeConfig(seed=1337, log_every=10),
        # Snapshots are taken while the rate is below half of its peak.
        average=AverageConfig(kind="lawa", interval=50, start=1 - 0.5 * WARMDOWN),
    )
