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
@pytest.mark.parametrize("recipe", ["tiny", "golf_baseline", "pr675"])
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


@pytest.mark.parametrize(("num_layers", "first_late"), [(9, 4), (12, 6), (1, 0)])
def test_the_second_half_of_the_blocks_has_its_own_rates(num_layers: int, first_late: int) -> None:
    config = TrainConfig().with_overrides(
        {
            "model.num_layers": num_layers,
            "optim.matrix_lr": 0.024,
            "optim.matrix_lr_late": 0.019,
            "optim.scalar_lr": 0.020,
            "optim.scalar_lr_late": 0.038,
            "optim.weight_decay": 0.3,
            "optim.scalar_weight_decay": 0.2,
            "optim.embed_weight_decay": 0.1,
        }
    )
    for name, rule in assign(parameter_table(config.model), param_rules(config)).items():
        late = name.startswith("blocks.") and int(name.split(".")[1]) >= first_late
        if name == "tok_emb.weight":
            want = (0.05, 0.1)
        elif rule.optimizer == "muon":
            want = (0.019 if late else 0.024, 0.3)
        else:  # skip_weights, outside the blocks, go with the first half
            want = (0.038 if late else 0.020, 0.2)
        assert (rule.lr, rule.weight_decay) == want, name


def test_a_late_rate_that_is_not_given_is_the_early_one() -> None:
    """Published scripts give the late bank the rate that is set for the early one."""
    config = TrainConfig().with_overrides({"optim.matrix_lr": 0.1, "optim.scalar_lr_late": 0.7})
    rules = assign(parameter_table(config.model), param_rules(config))
    assert {rule.lr for rule in rules.values() if rule.optimizer == "muon"} == {0.1}
    assert rules["blocks.8.attn.q_gain"].lr == 0.7
    assert rules["blocks.0.attn.q_gain"].lr == config.optim.scalar_lr


def test_equal_halves_have_no_rows_of_their_own() -> None:
    assert all(rule.layers is None for rule in param_rules(TrainConfig()))


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("blocks.0.resid_lambdas", 5 * 0.020, 0.0),  # own group: five times the rate, no decay
        ("blocks.8.resid_lambdas", 5 * 0.020, 0.0),
        ("visits.3.lora.up.a", 0.07, 0.0),
        ("visits.3.attn_scale", 0.020, 0.2),
        ("skip_gates", 0.020, 0.2),
        ("backout", 0.020, 0.2),
        ("channel_smear.gate", 0.020, 0.2),
        ("token_smear.scale", 0.020, 0.2),
        ("bigram.table.weight", 0.022, 0.1),
        ("bigram.proj.weight", 0.020, 0.2),
        ("value_embed.table.weight", 0.022, 0.1),
        ("value_embed.proj.weight", 0.020, 0.2),
        ("blocks.8.attn.value_embed.scale", 0.038, 0.2),
        ("blocks.1.attn.value_residual.gate", 0.020, 0.2),
    ],
)
def test_treatment_of_what_techniques_add(name: str, lr: float, weight_decay: float) -> None:
    config = TrainConfig().with_overrides(
        {
            "optim.scalar_lr": 0.020,
            "optim.scalar_lr_late": 0.038,
            "optim.scalar_weight_decay": 0.2,
            "optim.tied_embed_lr": 0.022,
            "optim.embed_weight_decay": 0.1,
            "optim.lora_lr": 0.07,
        }
    )
    rule = assign([name], param_rules(config))[name]
    assert rule.optimizer == "adam"
    assert (rule.lr, rule.weight_decay) == pytest.approx((lr, weight_decay))
