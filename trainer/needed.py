"""Modules that a run needs only under some settings: those of techniques that are off do not count.

A row that is missing costs bytes; a row that is wrong breaks the packed code, which the tests run
for small copies of every recipe. Loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import TrainConfig

OPTIONAL: dict[str, Callable[[TrainConfig], bool]] = {
    "trainer.attention.cudnn": lambda run: run.runtime.attention in ("cudnn", "fastest"),
    "trainer.attention.flash4": lambda run: run.runtime.attention in ("flash4", "fastest"),
    "trainer.attention.measured": lambda run: run.runtime.attention == "fastest",
    "trainer.attention.pseudo_tokens": lambda run: (
        run.model.iha == "interleaved" and run.model.iha_mask == "block"
    ),
    "trainer.attention.varlen": lambda run: run.runtime.attention == "varlen",
    "trainer.checkpoint": lambda run: (
        bool(run.source.checkpoint)
        or run.runtime.save_checkpoint
        or run.runtime.checkpoint_seconds > 0
        or run.evaluate.ensemble != "off"
    ),
    "trainer.compress.rans": lambda run: run.compress.codec.startswith("rans"),
    "trainer.compress.rans_classes": lambda run: run.compress.codec == "rans_classes",
    "trainer.config.iha": lambda run: run.model.iha != "off",
    "trainer.config.window_stages": lambda run: bool(run.model.window_stages),
    "trainer.data.document_shuffle": lambda run: run.data.loader == "shuffled_documents",
    "trainer.data.overlap": lambda run: run.data.max_overlap < 1,
    "trainer.ensemble": lambda run: run.evaluate.ensemble != "off",
    "trainer.evaluate.chunk_training": lambda run: run.evaluate.ttt == "chunks",
    "trainer.evaluate.document_training": lambda run: run.evaluate.ttt == "documents",
    "trainer.evaluate.naive_ttt": lambda run: run.evaluate.naive_ttt_epochs > 0,
    "trainer.evaluate.ngram_cache": lambda run: (
        run.evaluate.ngram_weight > 0 or run.evaluate.tilt_beta > 0
    ),
    "trainer.evaluate.tilt": lambda run: run.evaluate.tilt_beta > 0,
    "trainer.kernels.cross_entropy": lambda run: run.runtime.loss_kernel != "compiled",
    "trainer.kernels.iha": lambda run: (
        run.model.iha == "interleaved" and run.runtime.iha_kernel != "compiled"
    ),
    "trainer.kernels.mlp": lambda run: run.runtime.mlp_kernel != "compiled",
    "trainer.model.adapters": lambda run: run.evaluate.ttt == "documents",
    "trainer.model.differential": lambda run: run.model.diff_attention != "off",
    "trainer.model.iha": lambda run: run.model.iha != "off",
    "trainer.model.mtp": lambda run: run.model.mtp_weight > 0,
    "trainer.model.shared": lambda run: run.model.num_loops > 1,
    "trainer.resume": lambda run: run.runtime.checkpoint_seconds > 0,
    "trainer.optim.sharded_muon": lambda run: run.optim.muon_comm == "reduce_scatter",
    "trainer.quantize.allocation": lambda run: run.quantize.allocate != "off",
    "trainer.quantize.awq": lambda run: run.quantize.awq_groups > 0,
    "trainer.quantize.calibration": lambda run: run.quantize.method == "gptq",
    "trainer.quantize.gptq": lambda run: run.quantize.method == "gptq",
    "trainer.quantize.prune": lambda run: run.quantize.prune_to_fit,
    "trainer.quantize.sensitivity": lambda run: run.quantize.allocate != "off",
}
"""Module -> whether a run of these settings calls it. Whatever only it imports is left out too."""


def left_out(config: TrainConfig) -> frozenset[str]:
    """Optional modules that the run does without."""
    return frozenset(module for module, is_needed in OPTIONAL.items() if not is_needed(config))
