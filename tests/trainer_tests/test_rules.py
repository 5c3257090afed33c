"""The table of parameter treatment."""

import pytest

from trainer.account import parameter_table
from trainer.config import TrainConfig
from trainer.optim.rules import ParamRule, assign, param_rules
from trainer.recipes import RECIPES


def test_first_match_wins() -> None:
    rules = (ParamRule("a.*", "muon", 1.0), ParamRule("*", "adam", 2.0))
    assigned = assign(["a.x", "b"], rules)
    assert assigned == {"a.x": rules[0], "b": rules[1]}


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(AssertionError, match=r"bigram\.weight matches no rule"):
        assign(["bigram.weight"], param_rules(TrainConfig()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_treatment_of_every_parameter(recipe: str, tied: bool) -> None:
    config = (
        RECIPES[recipe]
        .build()
        .with_overrides(
            {
                "model.tie_embeddings": tied,
                "optim.matrix_lr": 0.11,
                "optim.scalar_lr": 0.22,
                "optim.tied_embed_lr": 0.33,
                "optim.embed_lr": 0.44,
                "optim.head_lr": 0.55,
                "optim.weight_decay": 0.66,
            }
        )
    )
    table = parameter_table(config.model)
    assigned = assign(table, param_rules(config))
    assert list(assigned) == list(table)
    matrices = {"q", "k", "v", "out", "up", "down"}
    for name, rule in assigned.items():
        treatment = (rule.optimizer, rule.lr, rule.weight_decay)
        if name == "tok_emb.weight":
            assert treatment == ("adam", 0.33 if tied else 0.44, 0.0)
        elif name == "head.weight":
            assert treatment == ("adam", 0.55, 0.0)
        elif matrices & set(name.split(".")):
            assert treatment == ("muon", 0.11, 0.66) and len(table[name]) == 2
        else:
            assert treatment == ("adam", 0.22, 0.0), name
    num_muon = sum(rule.optimizer == "muon" for rule in assigned.values())
    assert num_muon == 6 * config.model.num_layers
