"""The last accepted record of parameter-golf, #1855 (1.0611 on 8xH100, three seeds), to start from.

4,931 steps of 121.7 ms, 15,901,919 bytes; 1.0651 bits per byte after training, 1.0738 after
quantisation, 1.0611 with test-time training. Schedules are shares of the budget.

model.parallel_factors = "all" gives it the published 35,945,671 parameters, 48 of which nothing
reads; "used" is the same model without them. Calibration keeps 4 s of the clock, where the script
kept 0.5 and took about 3.5. The published runs had their text in CaseOps: make the data with
`caddie data prepare --caseops`. Weights are packed by role with brotli, not lrzip.
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

PUBLISHED_STEPS = 4931
"""Steps of the published runs in their 599 s."""
WORKER_TOKENS = 98_304
"""Tokens of a step on each of eight workers."""


def frontier() -> TrainConfig:
    """11 layers, width 512, 17 visits, two lanes from layer 8, 8192 pieces, GPTQ int6."""
    return TrainConfig(
        model=_model(),
        optim=_optim(),
        schedule=ScheduleConfig(
            warmdown="fraction", warmdown_frac=0.85, min_lr=0.1, recur_start=0.35
        ),
        data=DataConfig(
            seq_len=2048,
            batch_tokens=8 * WORKER_TOKENS,
            micro_batch_tokens=WORKER_TOKENS,
            loader="document",
        ),
        quantize=QuantizeConfig(
            scheme="int6",
            embed_bits=7,
            method="gptq",
            calibration="train",
            calibration_tokens=16 * WORKER_TOKENS,
            reserve_seconds=4.0,
            damping=0.01,
            act_order=True,
            clip="sigma",
            clip_sigmas=12.85,
            mlp_clip_sigmas=11.5,
            attn_clip_sigmas=13.0,
            embed_clip_sigmas=14.0,
            gate_bits=8,
            low_rank="asymmetric",
            low_rank_rank=4,
            low_rank_top_k=3,
            low_rank_group=64,
        ),
        compress=CompressConfig(
            codec="brotli", level=11, byte_shuffle=True, grouping="role_sorted"
        ),
        evaluate=_evaluate(),
        runtime=RuntimeConfig(seed=42, log_every=10),
        average=AverageConfig(kind="ema", decay=0.9965),
    )


def _model() -> ModelConfig:
    return ModelConfig(
        vocab_size=8192,
        num_layers=11,
        model_dim=512,
        num_heads=8,
        num_kv_heads=4,
        mlp_mult=4.0,
        qk_gain_init=5.0,
        leaky_slope=0.5,
        matrix_init="orthogonal",
        ln_scale=True,
        gated_skips=True,
        smear="token",
        smear_gate_dim=12,
        document_attention=True,
        max_doc_len=2048,
        xsa_last_n=11,
        rope_dims=16,
        attn_gate="sparse",
        attn_gate_dim=12,
        attn_gate_scale=0.5,
        recur_visits=3,
        recur_first=3,
        recur_last=5,
        parallel="lanes",
        parallel_start=8,
        parallel_merge="mean",
        parallel_factors="all",
    )


def _evaluate() -> EvaluateConfig:
    return EvaluateConfig(
        seq_len=2048,
        batch_tokens=524_288,
        ttt="documents",
        ttt_phases=3,
        ttt_prefix_docs=2500,
        ttt_doc_chunk_tokens=48,
        ttt_doc_batch=64,
        ttt_lora_rank=80,
        ttt_lora_alpha=144.0,
        ttt_lora_lr=1e-4,
        ttt_lora_beta2=0.99,
        ttt_lora_weight_decay=0.5,
        ttt_lora_warm_start=True,
        ttt_global_lr=0.001,
    )


def _optim() -> OptimConfig:
    return OptimConfig(
        matrix_lr=0.026,
        scalar_lr=0.02,
        tied_embed_lr=0.03,
        muon_row_normalize=True,
        orthogonalization="polar_express",
        muon_momentum=0.97,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_frac=1500 / PUBLISHED_STEPS,
        muon_backend_steps=5,
        muon_comm="reduce_scatter",
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.095,
        scalar_weight_decay=0.02,
        embed_weight_decay=0.085,
        grad_clip_norm=0.3,
    )
