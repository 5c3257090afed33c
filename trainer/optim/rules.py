"""Which optimiser updates which parameter, and how fast: a table, first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from trainer.config import TrainConfig


@dataclass(frozen=True)
class ParamRule:
    """A row: parameters whose name matches `pattern` (shell wildcards) are treated alike."""

    pattern: str
    optimizer: Literal["muon", "adam"]
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled: each step takes lr * weight_decay of the parameter away; 0 = off."""


def param_rules(config: TrainConfig) -> tuple[ParamRule, ...]:
    """The table of the challenge's baseline, with this run's numbers.

    Matrices of the blocks go to Muon; vectors and control tensors, the embedding and an untied head
    to Adam.
    """
    optim = config.optim
    embed_lr = optim.tied_embed_lr if config.model.tie_embeddings else optim.embed_lr
    return (
        ParamRule("blocks.*.resid_lambdas", "adam", 5 * optim.scalar_lr),
        ParamRule("blocks.*.weight", "muon", optim.matrix_lr, optim.weight_decay),
        ParamRule("blocks.*", "adam", optim.scalar_lr),
        ParamRule("visits.*", "adam", optim.scalar_lr),
        ParamRule("skip_weights", "adam", optim.scalar_lr),
        ParamRule("skip_gates", "adam", optim.scalar_lr),
        ParamRule("backout", "adam", optim.scalar_lr),
        ParamRule("bigram.table.weight", "adam", embed_lr),
        ParamRule("bigram.proj.weight", "adam", optim.scalar_lr),
        ParamRule("bigram.scale", "adam", optim.scalar_lr),
        ParamRule("value_embed.table.weight", "adam", embed_lr),
        ParamRule("value_embed.*", "adam", optim.scalar_lr),
        ParamRule("*_smear.*", "adam", optim.scalar_lr),
        ParamRule("tok_emb.weight", "adam", embed_lr),
        ParamRule("head.weight", "adam", optim.head_lr),
    )


def assign(names: Iterable[str], rules: Sequence[ParamRule]) -> dict[str, ParamRule]:
    """The rule of each parameter. A parameter without one is a fault of the table, not of a user:
    AssertionError that names it."""
    assigned = {}
    for name in names:
        rule = next((rule for rule in rules if fnmatchcase(name, rule.pattern)), None)
        assert rule is not None, f"parameter {name} matches no rule of the optimiser's table"
        assigned[name] = rule
    return assigned
