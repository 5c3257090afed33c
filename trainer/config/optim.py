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

    muon_momentum_average: bool = False
    """Momentum is a running average, B <- mu B + (1 - mu) G, not a sum. Only while mu changes do
    their directions differ."""
    muon_variance_beta: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """What remains after a step of the second moment of each neuron's orthogonalised update, whose
    root divides it; the update keeps its norm. Published: 0.95; 0 = off."""
    muon_cautious_decay: bool = False
    """A weight of Muon's decays only where the update takes it towards 0, and as much faster as
    the update of its matrix is scaled up."""
    gate_optimizer: Literal["adam", "muon"] = "adam"
    """What trains the gates on heads and on value projections, one matrix each."""
    mix_lr: Annotated[float, Field(ge=0)] = 0.0
    """Adam learning rate of the scalar factor on the embedding in model.resid_mix = "scalar"; 0 =
    scalar_lr."""
    mix_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of its first moment; 0 = adam_beta1."""
    xsa_lr: Annotated[float, Field(ge=0)] = 0.0
    """Adam learning rate of learned strengths of XSA; 0 = scalar_lr."""

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
    warmdown_power: PositiveFloat = 1.0
    """The falling multiplier is raised to this power; 0.5 = square root, 1 = linear."""
    cycles: Annotated[int, Field(ge=0)] = 0
    """Equal stretches at the end of the run in each of which the multiplier falls along a cosine
    to cycle_min_lr, from where the warmdown stands, so that a checkpoint at each stretch's end has
    settled; 0 = off."""
    cycle_share: Fraction = 0.0
    """Length of one of them as a share of the budget: that of an epoch."""
    cycle_min_lr: Fraction = 0.05
    """Multiplier at the end of a cycle."""
    decay_points: str = ""
    """Factor on every weight decay as VALUE@SHARE of the budget, linear between and constant
    outside, as in "1@0.4,0.65@0.64"; "" = 1 throughout."""
    cycle_decay: str = ""
    """The same within a cycle of `cycles`, as FROM:TO, linear, as in "0.65:1.5"; "" = by
    decay_points."""
    recur_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the budget after which training recurs (model.recur_visits); 0 = from the start."""
    recur_phases: str = ""
    """Recurrence in steps instead, as in "2@0.5,3@0.65": two visits from half of the budget on,
    three from 0.65 on; the last number is model.recur_visits. "" = by recur_start."""

    @model_validator(mode="after")
    def _cycles_fit(self) -> Self:
        faults = []
        if bool(self.cycles) != bool(self.cycle_share):
            faults.append(
                f"schedule.cycles = {self.cycles} and schedule.cycle_share = {self.cycle_share:g}: "
                "one is nothing without the other; set both, or neither"
            )
        if self.cycles * self.cycle_share > 1 + 1e-9:
            faults.append(
                f"schedule.cycles = {self.cycles} of schedule.cycle_share = {self.cycle_share:g} "
                "are more than the budget; lower one of them"
            )
        if self.cycle_decay and not self.cycles:
            faults.append(
                f"schedule.cycle_decay = {self.cycle_decay!r} is about cycles, but schedule.cycles "
                '= 0; raise it, or set schedule.cycle_decay = ""'
            )
        for name, parse in (("decay_points", parse_points), ("cycle_decay", parse_span)):
            try:
                parse(getattr(self, name))
            except ValueError as error:
                faults.append(f"schedule.{name} = {getattr(self, name)!r}: {error}")
        return raise_together(self, faults)


def parse_points(text: str) -> tuple[tuple[float, float], ...]:
    """ "1@0.4,0.65@0.64" -> ((0.4, 1.0), (0.64, 0.65)): share of the budget, factor.

    Raises ValueError with the remedy, but not the name of the setting.
    """
    points: list[tuple[float, float]] = []
    for part in text.split(",") if text else ():
        value, share = _numbers(part, "@", "VALUE@SHARE as in 1@0.4,0.65@0.64")
        if not 0 <= share <= 1 or (points and share <= points[-1][0]):
            raise ValueError(f"the share of {part!r} must be above the one before, within 0 and 1")
        points.append((share, value))
    return tuple(points)


def parse_span(text: str) -> tuple[float, float] | None:
    """ "0.65:1.5" -> (0.65, 1.5); "" -> None. ValueError as parse_points."""
    return _numbers(text, ":", "FROM:TO as in 0.65:1.5") if text else None


def _numbers(part: str, mark: str, form: str) -> tuple[float, float]:
    first, _, second = part.partition(mark)
    try:
        pair = float(first), float(second)
    except ValueError:
        raise ValueError(f"{part!r} is no pair of numbers; write {form}") from None
    if not (0 <= pair[0] < float("inf") and 0 <= pair[1] < float("inf")):
        raise ValueError(f"{part!r} has a number below 0 or none at all; write {form}")
    return pair


class LossConfig(Settings):
    """What training minimises. Scores are always the plain cross-entropy."""

    kind: Literal["cross_entropy", "mile", "entropy", "entropy_published", "ahead"] = (
        "cross_entropy"
    )
    """"mile": tokens predicted with certainty count less, (1 - exp(-entropy))^gamma. "entropy":
    uncertain tokens count more, weights of mean 1. "entropy_published": the same without that
    normalisation, which inflates the loss and with it the step. "ahead": one head scored against
    several of the next tokens (slowrun, its tiny track)."""
    ahead_weights: str = "1,0.5,0.25"
    """Weights of the next token, the one after it, and so on, under "ahead"."""
    ahead_until: Annotated[float, Field(gt=0, le=1)] = 0.66
    """Share of the budget after which only the next token counts: the others' weights fall
    linearly to 0 one after another, the farthest first."""
    mile_gamma: Annotated[float, Field(ge=0)] = 0.75
    """Peak of MiLe's exponent, which follows the budget in a triangle from 0 to 0."""
    mile_clamp_min: Fraction = 0.2
    """Smallest weight of a token under MiLe."""
    mile_peak_frac: Fraction = 0.4
    """Share of the budget at which MiLe's exponent peaks."""

    @model_validator(mode="after")
    def _weights_parse(self) -> Self:
        faults = []
        try:
            weights = self.ahead
        except ValueError:
            weights = ()
        if not weights or weights[0] <= 0 or not all(0 <= w < float("inf") for w in weights):
            faults.append(
                f"loss.ahead_weights = {self.ahead_weights!r} are no weights, the first above 0; "
                "write them as in 1,0.5,0.25"
            )
        return raise_together(self, faults)

    @property
    def ahead(self) -> tuple[float, ...]:
        """ahead_weights as numbers."""
        return tuple(float(part) for part in self.ahead_weights.split(","))


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
