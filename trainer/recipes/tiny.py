"""The same code at a size that two CPU cores train in seconds, for `make demo` and the tests."""

from trainer.config import (
    BudgetConfig,
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


def tiny() -> TrainConfig:
    """3 layers, width 64, 512 pieces; int6 + byte shuffle + brotli; budgets of the laptop track."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=512,
            num_layers=3,
            model_dim=64,
            num_heads=4,
            num_kv_heads=2,
            mlp_mult=2.0,
        ),
        optim=OptimConfig(muon_momentum_warmup_steps=50),
        schedule=ScheduleConfig(warmdown="fraction", warmdown_frac=0.4),
        data=DataConfig(seq_len=128, batch_tokens=2048, micro_batch_tokens=2048),
        quantize=QuantizeConfig(scheme="int6", keep_float_max_numel=1024),
        compress=CompressConfig(codec="brotli", level=11, byte_shuffle=True),
        evaluate=EvaluateConfig(seq_len=128, batch_tokens=8192),
        budget=BudgetConfig(
            train_seconds=8.0, eval_seconds=30.0, artifact_bytes=200_000, min_steps=20
        ),
        runtime=RuntimeConfig(prime_steps=1, log_every=5),
    )
