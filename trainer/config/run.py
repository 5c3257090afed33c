"""Settings of the run: its limits, and how it is executed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import PositiveFloat, PositiveInt, Settings


class BudgetConfig(Settings):
    """The limits a run must keep. Filled from a track; None = no limit."""

    train_seconds: PositiveFloat | None = 600.0
    """Seconds of training on the run's own hardware, calibration included."""
    eval_seconds: PositiveFloat | None = 600.0
    """Seconds for everything that produces the score."""
    artifact_bytes: PositiveInt | None = 16_000_000
    """Packed code plus packed model."""
    train_tokens: PositiveInt | None = None
    """Distinct training tokens that may be used, any number of times: the first ones; the rest of
    the data set is not read."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps."""
    min_steps: Annotated[int, Field(ge=0)] = 0
    """Fewer steps within train_seconds than this make the run worthless; 0 = off."""


class RuntimeConfig(Settings):
    """How, not what: nothing here should change a result beyond rounding. Outside the digest,
    except seed and dtype."""

    seed: int = 1337
    """Seeds initial weights and every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" = cuda where there is one."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute type of matrix products; "auto" = bfloat16 on cuda, float32 on cpu."""
    attention: Literal["auto", "fastest", "sdpa", "cudnn", "flex", "flash4", "varlen"] = "auto"
    """Attention backend; "auto" picks of what PyTorch brings, "fastest" of all by a measured table
    (trainer/attention/measured.py), and both say what they took."""
    mlp_kernel: Literal[
        "compiled", "auto", "fused", "fused_saved", "fused_norm", "fused_norm_saved"
    ] = "compiled"
    """How the MLP is trained: "compiled" is plain code; "fused" one operator whose products apply
    the activation, "saved" keeping its slope for the backward pass, "norm" normalising too; "auto"
    picks what was measured to win and says what it took."""
    loss_kernel: Literal["compiled", "auto", "fused"] = "compiled"
    """How the training loss is computed: "compiled" is plain code; "fused" one operator in which
    the capped logits never exist; "auto" as above."""
    iha_kernel: Literal["compiled", "auto", "fused"] = "compiled"
    """How pseudo-heads of model.iha = "interleaved" are made in training: "compiled" is plain code;
    "fused" one operator that mixes, turns and normalises; "auto" as above."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; "auto" = on for cuda."""
    compile_cache: str = "auto"
    """Folder in which what was compiled is kept for later runs; "auto" = one of the user's, unless
    TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR say otherwise; "off" = the compiler's own choice."""
    prime_steps: Annotated[int, Field(ge=0)] = 3
    """Real steps before the clock starts, so that every graph is compiled; undone afterwards."""
    prime_batches: Literal["all", "shapes"] = "all"
    """What a primed step works on: every micro batch of a step, or one of each shape, which
    compiles the same graphs in less time."""
    prime_score: Literal["before", "after"] = "before"
    """When the graphs of the score are compiled: before training, so that a fault shows early, or
    after it, so that training starts sooner. Outside every clock either way."""
    log_every: PositiveInt = 10
    """Steps between metric records."""
    val_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations outside the clock; 0 = only at the end."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds of training between two writings of the run's whole state, outside the clock, so that
    a run whose worker was lost goes on where it was; 0 = off."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" = go on from a state that runtime.checkpoint_seconds left in the run's folder."""
    save_checkpoint: bool = False
    """Write the trained weights, averaged where average.kind says so, beside the artifact as
    checkpoint.bin, for source.checkpoint."""
