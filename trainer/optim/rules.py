"""Which optimiser updates which parameter, and how fast: a table, first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal

from trainer.config import TrainConfig


@dataclass(frozen=True)
class ParamRule:
    """A row: parameters whose name matches `pattern` (shell wildcards), in blocks of `layers` where
    that is given, are treated alike."""

    pattern: str
    optimizer: Literal["muon", "adam"]
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled: each step takes lr * weight_decay of the parameter away; 0 = off."""
    layers: tuple[int, int] | None = None
    """First block and the one after the last; None = all blocks and what is outside them."""
    beta1: float = 0.0
    """Decay of Adam's first moment; 0 = optim.adam_beta1."""

    def matches(self, name: str) -> bool:
        """Whether this row is for the parameter of that name."""
        if not fnmatchcase(name, self.pattern):
            return False
        if self.layers is None:
            return True
        group, _, rest = name.partition(".")
        if group != "blocks":
            return False
        return self.layers[0] <= int(rest.split(".")[0]) < self.layers[1]


RESID_LAMBDA_LR = 5.0
"""Rate of the learned factors on the residual stream over scalar_lr (parameter-golf #1130)."""


def param_rules(config: TrainConfig) -> tuple[ParamRule, ...]:
    """The table of the challenge's baseline with what techniques add, with this run's numbers.

    Matrices of the blocks go to Muon; vectors and control tensors, tables that tokens look up, and
    an untied head to Adam. The second half of the blocks has rows of its own where its rates
    differ; scalars outside the blocks go with the first half, and so do the factors on the
    residual stream, which published scripts keep in one tensor outside the blocks.
    """
    optim = config.optim
    embed_lr = optim.tied_embed_lr if config.model.tie_embeddings else optim.embed_lr
    scalar = partial(_adam, optim.scalar_lr, optim.scalar_weight_decay)
    table = partial(_adam, embed_lr, optim.embed_weight_decay)
    return (
        ParamRule("blocks.*.resid_lambdas", "adam", RESID_LAMBDA_LR * optim.scalar_lr),
        *_recurrence_rules(config),
        *_slowrun_rules(config, "blocks.*"),
        *_late_rules(config),
        ParamRule("blocks.*.weight", "muon", optim.matrix_lr, optim.weight_decay),
        *_slowrun_rules(config, "mtp.block"),
        ParamRule("mtp.*.weight", "muon", optim.matrix_lr, optim.weight_decay),
        scalar("mtp.*"),
        scalar("blocks.*"),
        ParamRule("visits.*.lora.*", "adam", optim.lora_lr),
        scalar("visits.*"),
        scalar("skip_weights"),
        scalar("skip_gates"),
        scalar("recur_skip_*"),
        scalar("lane_merge.*"),
        scalar("backout"),
        scalar("*_smear.*"),
        table("bigram.table.weight"),
        scalar("bigram.proj.weight"),
        scalar("bigram.scale"),
        table("value_embed.table.weight"),
        scalar("value_embed.*"),
        table("tok_emb.weight"),
        ParamRule("head.weight", "adam", optim.head_lr, optim.head_weight_decay),
    )


def _adam(lr: float, weight_decay: float, pattern: str) -> ParamRule:
    return ParamRule(pattern, "adam", lr, weight_decay)


def _gates(config: TrainConfig) -> tuple[Literal["muon", "adam"], float, float]:
    """Optimiser, rate and decay of gates."""
    optim = config.optim
    if optim.gate_optimizer == "muon":
        return "muon", optim.matrix_lr, optim.weight_decay
    return "adam", optim.scalar_lr, optim.scalar_weight_decay


def _slowrun_rules(config: TrainConfig, blocks: str) -> tuple[ParamRule, ...]:
    """Rows of what slowrun's blocks have (its table of AdamW groups), the extra one too."""
    optim = config.optim
    mix_lr, xsa_lr = (lr or optim.scalar_lr for lr in (optim.mix_lr, optim.xsa_lr))
    return (
        ParamRule(f"{blocks}.embed_factor", "adam", mix_lr, beta1=optim.mix_beta1),
        ParamRule(f"{blocks}.keep_factor", "adam", optim.scalar_lr),
        ParamRule(f"{blocks}.attn.xsa.strength", "adam", xsa_lr),
        ParamRule(f"{blocks}.value_proj.gate.*", *_gates(config)),
        ParamRule(f"{blocks}.attn.iha.*", "adam", optim.iha_lr),
        ParamRule(f"{blocks}.attn.gate.*", *_gates(config)),
    )


def _recurrence_rules(config: TrainConfig) -> tuple[ParamRule, ...]:
    """Rows of what repeat visits have of their own. Each visit's MLPs have a row of their own, so
    that they do not share a stack with matrices that are in use before them."""
    optim = config.optim
    return (
        ParamRule("blocks.*.blend_factors", "adam", optim.scalar_lr, optim.recur_weight_decay),
        ParamRule("blocks.*.lora.*", "adam", optim.lora_lr),
        *(
            ParamRule(
                f"blocks.*.repeats.{repeat}.mlp.*", "muon", optim.matrix_lr, optim.weight_decay
            )
            for repeat in range(config.model.recur_visits - 1)
        ),
    )


def _late_rules(config: TrainConfig) -> tuple[ParamRule, ...]:
    """Rows of the blocks from num_layers // 2 on (parameter-golf #1130, #1212); none when both
    halves have the same rates."""
    optim = config.optim
    if not optim.matrix_lr_late and not optim.scalar_lr_late:
        return ()
    late = (config.model.num_layers // 2, config.model.num_layers)
    matrix_lr = optim.matrix_lr_late or optim.matrix_lr
    scalar_lr = optim.scalar_lr_late or optim.scalar_lr
    return (
        ParamRule("blocks.*.weight", "muon", matrix_lr, optim.weight_decay, late),
        ParamRule("blocks.*", "adam", scalar_lr, optim.scalar_weight_decay, late),
    )


def assign(names: Iterable[str], rules: Sequence[ParamRule]) -> dict[str, ParamRule]:
    """The rule of each parameter. A parameter without one is a fault of the table, not of a user:
    AssertionError that names it."""
    assigned = {}
    for name in names:
        rule = next((rule for rule in rules if rule.matches(name)), None)
        assert rule is not None, f"parameter {name} matches no rule of the optimiser's table"
        assigned[name] = rule
    return assigned
