"""How a packed model is scored: windows and training by chunks, or adapters of documents.

Meant for a fixed artifact, so that a trial is one evaluation:

    caddie sweep run evaluation --set source.artifact=PATH/artifact.bin

The model comes from the file, whatever the recipe says. Without source.artifact every trial trains
the recipe.
"""

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Space

RECIPE = "golf_baseline"

EVALUATION = Space(
    name="evaluation",
    recipe=RECIPE,
    track="golf-10min-16mb",
    axes={
        "evaluate.seq_len": CategoricalDistribution([1024, 2048, 4096]),
        "evaluate.stride": CategoricalDistribution([0, 64, 128, 256, 512]),
        "evaluate.ttt": CategoricalDistribution(["off", "chunks"]),
        "evaluate.ttt_lr": FloatDistribution(0.0005, 0.02, log=True),
        "evaluate.ttt_epochs": IntDistribution(1, 5),
        "evaluate.ttt_chunk_tokens": CategoricalDistribution([8_192, 16_384, 32_768, 65_536]),
        "evaluate.ttt_part": CategoricalDistribution(["all", "mlp"]),
        "evaluate.ttt_freeze_blocks": IntDistribution(0, 4),
    },
    enqueued=(
        {"evaluate.seq_len": 1024, "evaluate.stride": 0, "evaluate.ttt": "off"},
        {"evaluate.seq_len": 1024, "evaluate.stride": 64, "evaluate.ttt": "off"},
        {
            "evaluate.seq_len": 1024,
            "evaluate.stride": 64,
            "evaluate.ttt": "chunks",
            "evaluate.ttt_lr": 0.005,
            "evaluate.ttt_epochs": 3,
            "evaluate.ttt_chunk_tokens": 32_768,
            "evaluate.ttt_part": "all",
            "evaluate.ttt_freeze_blocks": 0,
        },
        {"evaluate.seq_len": 2048, "evaluate.stride": 64, "evaluate.ttt": "off"},
    ),
    description="row length, stride and training by chunks of one packed model",
)

PUBLISHED = {
    "evaluate.ttt": "documents",
    "evaluate.ttt_lora_rank": 96,
    "evaluate.ttt_lora_lr": 1e-4,
    "evaluate.ttt_lora_beta2": 0.999,
    "evaluate.ttt_lora_weight_decay": 0.5,
    "evaluate.ttt_doc_chunk_tokens": 32,
    "evaluate.ttt_lora_targets": "q,k,v,out,mlp,head",
    "evaluate.ttt_phases": 0,
    "evaluate.ttt_prefix_docs": 2000,
}

EVALUATION_DOCUMENTS = Space(
    name="evaluation_documents",
    recipe=RECIPE,
    track="golf-10min-16mb",
    axes={
        "evaluate.ttt": CategoricalDistribution(["documents"]),
        "evaluate.ttt_lora_rank": CategoricalDistribution([0, 8, 32, 80, 96]),
        "evaluate.ttt_lora_lr": FloatDistribution(2e-5, 5e-4, log=True),
        "evaluate.ttt_lora_beta2": CategoricalDistribution([0.99, 0.999]),
        "evaluate.ttt_lora_weight_decay": FloatDistribution(0.1, 2.0, log=True),
        "evaluate.ttt_doc_chunk_tokens": CategoricalDistribution([32, 48, 64]),
        "evaluate.ttt_lora_targets": CategoricalDistribution(
            ["q,k,v,out,mlp,head", "q,v,out,mlp,head", "k,out,mlp,head", "head"]
        ),
        "evaluate.ttt_phases": IntDistribution(0, 3),
        "evaluate.ttt_prefix_docs": CategoricalDistribution([2000, 2500]),
    },
    enqueued=(
        {**PUBLISHED, "evaluate.ttt_lora_rank": 0},
        PUBLISHED,
        {
            **PUBLISHED,
            "evaluate.ttt_lora_rank": 80,
            "evaluate.ttt_lora_beta2": 0.99,
            "evaluate.ttt_doc_chunk_tokens": 48,
            "evaluate.ttt_phases": 3,
            "evaluate.ttt_prefix_docs": 2500,
        },
    ),
    description="adapters of documents, with and without phases, on one packed model",
)
