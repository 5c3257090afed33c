"""Settings of the optimiser and its schedules, of the loss, and of averaged weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.config.base import Fraction, PositiveFloat, PositiveInt, Settings, raise_together


class OptimConfig(Settings):
    """Muon for the matrices of the blocks, Adam for the rest. Learning rates are peak values."""

    matrix_lr: PositiveFloat = 0.04
    """Muon learning rate of the blocks' matrices."""
    scalar_lr: PositiveFloat = 0.04
    """Adam learning rate of vectors and control tensors."""
    tied_embed_lr: PositiveFloat = 0.05
    """Adam learning rate of the embedding when it is tied to the head."""
    embed_lr: PositiveFloat = 0.6
    """Adam learning rate of the embedding when it is not tied."""
    head_lr: PositiveFloat = 0.008
    """Adam learning rate of the head when it is not tied."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon after its warm-up."""
    muon_momentum_warmup_start: Annotated[float, Field(ge=0, lt=1)] = 0.85
    """Momentum of Muon at step 0."""
    muon_momentum_warmup_steps: Annotated[int, Field(ge=0)] = 500
    """Steps over which the momentum rises linearly; 0 = none."""
    muon_backend_steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the blocks' matrices, times the learning rate; 0 = off."""
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Global gradient norm bound; 0 = off."""
    matrix_lr_late: Annotated[float, Field(ge=0)] = 0.0
    """Muon learning rate of the second half of the blocks; 0 = matrix_lr."""
    scalar_lr_late: Annotated[float, Field(ge=0)] = 0.0
    """Adam learning rate of vectors and control tensors of the second half of the blocks; 0 =
    scalar_lr. Those outside the blocks always take scalar_lr."""
    muon_comm: Literal["all_reduce", "reduce_scatter"] = "all_reduce"
    """How ranks share Muon's work. "all_reduce": every rank averages all gradients and keeps all
    momentum. "reduce_scatter": a rank receives only the gradients of its share of each bank of
    matrices, keeps only their momentum, and hands round the results."""
    muon_momentum_warmup_frac: Fraction = 0.0
    """Share of the budget over which Muon's momentum rises, in place of
    muon_momentum_warmup_steps; 0 = by steps."""
    weight_decay_ramp: Annotated[float, Field(ge=0)] = 0.0
    """Added to weight_decay times (1 - learning-rate multiplier), so that decay grows while the
    rate falls; 0 = constant."""
    scalar_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of vectors and control tensors; 0 = off."""
    embed_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the embedding and other tables that tokens look up; 0 = off."""
    head_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of an untied head; 0 = off."""
    lora_lr: PositiveFloat = 0.04
    """Adam learning rate of the adapters of shared and of recurring blocks."""
    recur_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the learned blend of recurrence (model.recur_blend), which would
    rest at a = 1; 0 = off. Published runs let scalar_weight_decay pull at it."""
    muon_row_normalize: bool = False
    """MuonEq-R: rows of the momentum are brought to norm 1 before they are orthogonalised."""
    muon_row_eps: PositiveFloat = 1e-7
    """A row's norm counts as at least this under muon_row_normalize."""
    iha_lr: PositiveFloat = 0.02
    """Adam learning rate of the mixes of heads (model.iha), without weight decay."""
    orthogonalization: Literal["newton_schulz", "polar_express", "gram", "turbo"] = "newton_schulz"
    """"newton_schulz": one polynomial, muon_backend_steps times. "polar_express": a polynomial of
    its own for each iteration. "gram": such polynomials worked out on the short side of matrices
    that are more than twice as long as wide. "turbo": rows preconditioned, which saves one
    iteration (published with muon_backend_steps = 4)."""
    muon_post_norm: Literal["none", "row", "col", "row_col"] = "none"
    """What of an orthogonalised update is brought to norm 1: rows, columns, or one after the other
    (published with "turbo")."""
    weight_decay_taper_start: Fraction = 1.0
    """Share of the budget from which the matrices' weight decay falls linearly to
    weight_decay_taper_final of itself at the end; 1 = off."""
    weight_decay_taper_final: Fraction = 0.5
    """Multiplier on the matrices' weight decay at the end of a taper."""

    @model_validator(mode="after")
    def _iterations_exist(self) -> Self:
        most = MOST_STEPS.get(self.orthogonalization)
        faults = []
        if most is not None and self.muon_backend_steps > most:
            faults.append(
                f"optim.muon_backend_steps = {self.muon_backend_steps} is above {most}, the "
                f'polynomials of optim.orthogonalization = "{self.orthogonalization}"; lower it'
            )
        return raise_together(self, faults)


MOST_STEPS = {"polar_express": 5, "gram": 5, "turbo": 6}
"""Iterations for which optim.orthogonalization has polynomials, where it is a table."""


class ScheduleConfig(Settings):
    """How learning rates follow the budget."""

    progress: Literal["clock", "steps"] = "clock"
    """What drives the schedules: the share of budget.train_seconds that is spent, or the share of
    budget.max_steps. "steps" makes a run reproducible bit for bit on one machine."""
    warmdown: Literal["steps", "fraction"] = "steps"
    """"steps": decay over the last warmdown_steps at the present step time, as the challenge's
    baseline does. "fraction": decay over the last warmdown_frac of the budget."""
    warmdown_steps: Annotated[int, Field(ge=0)] = 1200
    """Length of the warmdown for "steps"; 0 = no warmdown."""
    warmdown_frac: Fraction = 0.1
    """Length of the warmdown for "fraction"; 0 = no warmdown."""
    min_lr: Fraction = 0.0
    """Floor of the learning-rate multiplier."""
    recur_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the budget after which training recurs (model.recur_visits); 0 = from the start."""
    recur_phases: str = ""
    """Recurrence in steps instead, as in "2@0.5,3@0.65": two visits from half of the budget on,
    three from 0.65 on; the last number is model.recur_visits. "" = by recur_start."""


class LossConfig(Settings):
    """What training minimises. Scores are always the plain cross-entropy."""

    kind: Literal["cross_entropy", "mile", "entropy", "entropy_published"] = "cross_entropy"
    """"mile": tokens predicted with certainty count less, (1 - exp(-entropy))^gamma. "entropy":
    uncertain tokens count more, weights of mean 1. "entropy_published": the same without that
    normalisation, which inflates the loss and with it the step."""
    mile_gamma: Annotated[float, Field(ge=0)] = 0.75
    """Peak of MiLe's exponent, which follows the budget in a triangle from 0 to 0."""
    mile_clamp_min: Fraction = 0.2
    """Smallest weight of a token under MiLe."""
    mile_peak_frac: Fraction = 0.4
    """Share of the budget at which MiLe's exponent peaks."""


class AverageConfig(Settings):
    """An average of the weights along the run, in fp32, in place of the last weights."""

    kind: Literal["none", "ema", "swa", "lawa"] = "none"
    """"ema": exponential average over every step. "swa": mean of the weights at every interval-th
    step. "lawa": mean of the last `keep` such snapshots and the final weights."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.997
    """What remains of EMA after a step. It remembers about 1 / (1 - decay) steps: lower it for
    runs that are not much longer."""
    interval: PositiveInt = 50
    """Steps between the snapshots of SWA and LAWA."""
    keep: Annotated[int, Field(ge=0)] = 0
    """Snapshots that LAWA keeps, each as large as the model; 0 = all."""
    start: Fraction = 0.0
    """Share of the budget after which the average begins."""
    shadow: Literal["float32", "bfloat16_embedding"] = "float32"
    """What EMA keeps. "bfloat16_embedding": the token embedding's average in bf16, whose steps are
    coarser than what it should move by, so that it lags: the published EMA of #1894, for replays
    only."""

    @model_validator(mode="after")
    def _it_begins(self) -> Self:
        faults = []
        if self.kind != "none" and self.start == 1:
            faults.append(
                f'average.kind = "{self.kind}" would never begin at average.start = 1; lower it, '
                'or set average.kind = "none"'
            )
        if self.kind in ("swa", "lawa") and self.shadow != "float32":
            faults.append(
                f'average.shadow = "{self.shadow}" is a mistake of EMA alone; set average.shadow = '
                '"float32", or average.kind = "ema"'
            )
        return raise_together(self, faults)
