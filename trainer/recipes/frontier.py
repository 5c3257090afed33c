"""The last accepted record of parameter-golf, #1855 (1.0611 on 8xH100, three seeds), to start from.

4,931 steps of 121.7 ms, 15,901,919 bytes; 1.0651 bits per byte after training, 1.0738 after
quantisation, 1.0611 with test-time training. Schedules are shares of the budget.

model.parallel_factors = "all" gives it the published 35,945,671 parameters, 48 of which nothing
reads; "used" is the same model without them. Calibration keeps 4 s of the clock, where the script
kept 0.5 and took about 3.5. The published runs had their text in CaseOps: make the data with
`caddie data prepare --caseops`. Weights are packed by role with brotli, not lrzip.

Without lrzip it is forecast at 16.1 MB (a public re-run with brotli had 16,112,007 bytes), so
sweeps refuse it before launch: add quantize.allocate=rate_distortion, which packs it to fit.
"""

from trainer.config import TrainConfig
from trainer.recipes.april import WORKER_TOKENS, april

PUBLISHED_STEPS = 4931
"""Steps of the published runs in their 599 s."""


def frontier() -> TrainConfig:
    """11 layers, width 512, 17 visits, two lanes from layer 8, 8192 pieces, GPTQ int6."""
    return april().with_overrides(
        {
            "model.qk_gain_init": 5.0,
            "model.smear": "token",
            "model.smear_gate_dim": 12,
            "model.document_attention": True,
            "model.max_doc_len": 2048,
            "model.xsa_last_n": 11,
            "model.attn_gate": "sparse",
            "model.attn_gate_dim": 12,
            "model.attn_gate_scale": 0.5,
            "model.parallel": "lanes",
            "model.parallel_start": 8,
            "model.parallel_merge": "mean",
            "model.parallel_factors": "all",
            "optim.matrix_lr": 0.026,
            "optim.orthogonalization": "polar_express",
            "optim.muon_momentum": 0.97,
            "optim.muon_momentum_warmup_frac": 1500 / PUBLISHED_STEPS,
            "optim.muon_comm": "reduce_scatter",
            "optim.adam_beta2": 0.99,
            "schedule.warmdown_frac": 0.85,
            "schedule.min_lr": 0.1,
            "schedule.recur_start": 0.35,
            "data.loader": "document",
            "quantize.embed_bits": 7,
            "quantize.mlp_clip_sigmas": 11.5,
            "quantize.attn_clip_sigmas": 13.0,
            "quantize.embed_clip_sigmas": 14.0,
            "quantize.gate_bits": 8,
            "quantize.low_rank": "asymmetric",
            "quantize.low_rank_rank": 4,
            "quantize.low_rank_top_k": 3,
            "quantize.low_rank_group": 64,
            "quantize.calibration_tokens": 16 * WORKER_TOKENS,
            "quantize.reserve_seconds": 4.0,
            "compress.grouping": "role_sorted",
            "evaluate.ttt": "documents",
            "evaluate.ttt_phases": 3,
            "evaluate.ttt_prefix_docs": 2500,
            "evaluate.ttt_doc_chunk_tokens": 48,
            "evaluate.ttt_doc_batch": 64,
            "evaluate.ttt_lora_rank": 80,
            "evaluate.ttt_lora_alpha": 144.0,
            "evaluate.ttt_lora_lr": 1e-4,
            "evaluate.ttt_lora_beta2": 0.99,
            "evaluate.ttt_lora_weight_decay": 0.5,
            "evaluate.ttt_lora_warm_start": True,
            "evaluate.ttt_global_lr": 0.001,
            "runtime.seed": 42,
            "average.kind": "ema",
            "average.decay": 0.9965,
        }
    )
