"""Settings: overrides, faults reported together, digests, exact round trips. CPU, no torch."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from trainer.config import CompressConfig, Settings, TrainConfig, parse_overrides
from trainer.errors import ConfigError
from trainer.recipes import RECIPES


def _faults(overrides: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainConfig().with_overrides(overrides)
    return str(caught.value).split("\n")


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    base = TrainConfig()
    changed = base.with_overrides({"optim.matrix_lr": 0.02, "model.num_layers": 12})
    assert changed.difference(base) == {"optim.matrix_lr": 0.02, "model.num_layers": 12}
    assert base == TrainConfig()
    assert base.with_overrides({}) == base


def test_an_override_may_be_none_where_there_is_no_limit() -> None:
    config = TrainConfig().with_overrides({"budget.artifact_bytes": None})
    assert config.budget.artifact_bytes is None


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("optim.matrix_lrr", "optim.matrix_lr"),
        ("matrix_lr", "optim.matrix_lr"),
        ("optim.num_layers", "model.num_layers"),
        ("model.n_layers", "model.num_layers"),
    ],
)
def test_an_unknown_path_names_the_nearest(path: str, near: str) -> None:
    (fault,) = _faults({path: 1})
    assert fault.startswith(f"{path}: no such setting; did you mean ")
    assert near in fault


@pytest.mark.parametrize("path", ["model", "", "model.", ".", "optim.matrix_lr.x", "qqqq"])
def test_what_is_no_leaf_is_unknown(path: str) -> None:
    (fault,) = _faults({path: 1})
    assert fault.startswith(f"{path}: no such setting; ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.matrix_lr", "fast"),
        ("optim.matrix_lr", float("nan")),
        ("optim.matrix_lr", float("inf")),
        ("optim.matrix_lr", 0),
        ("optim.muon_momentum", 1.0),
        ("model.num_layers", 2.5),
        ("model.num_layers", None),
        ("model.num_layers", 0),
        ("quantize.scheme", "int5"),
        ("quantize.embed_bits", 9),
        ("quantize.clip_percentile", 50),
        ("compress.level", 23),
        ("data.dir", 3),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path: str, value: object) -> None:
    (fault,) = _faults({path: value})
    assert fault.startswith(f"{path} = {value!r}: ")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model.num_heads": 7, "model.num_kv_heads": 1}, ["model.num_heads", "model.model_dim"]),
        ({"model.model_dim": 8, "model.num_heads": 8}, ["odd"]),
        ({"model.num_kv_heads": 3}, ["model.num_kv_heads", "model.num_heads"]),
        ({"data.batch_tokens": 1000}, ["data.batch_tokens", "data.seq_len"]),
        ({"data.micro_batch_tokens": 512}, ["data.micro_batch_tokens", "data.seq_len"]),
        ({"compress.codec": "zlib", "compress.level": 10}, ["compress.level", "zlib"]),
        ({"budget.train_seconds": None}, ["schedule.progress", "budget.train_seconds"]),
        ({"schedule.progress": "steps"}, ["schedule.progress", "budget.max_steps"]),
        ({"evaluate.batch_tokens": 1}, ["evaluate.batch_tokens", "evaluate.seq_len"]),
    ],
)
def test_a_broken_rule_names_the_settings_that_it_ties(
    overrides: dict[str, Any], named: list[str]
) -> None:
    (fault,) = _faults(overrides)
    for name in named:
        assert name in fault


def test_all_faults_are_reported_together() -> None:
    faults = _faults(
        {
            "optim.matrix_lrr": 0.1,
            "optim.scalar_lr": "fast",
            "model.num_heads": 7,
            "model.num_kv_heads": 3,
            "data.batch_tokens": 1000,
        }
    )
    for part in (
        "optim.matrix_lrr: no such setting",
        "optim.scalar_lr = 'fast'",
        "model.num_heads = 7 does not divide model.model_dim",
        "model.num_kv_heads = 3 does not divide model.num_heads = 7",
        "data.seq_len = 1024 does not divide data.batch_tokens = 1000",
    ):
        assert sum(part in fault for fault in faults) == 1, (part, faults)
    assert len(faults) == 5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json_exactly(name: str) -> None:
    config = RECIPES[name].build().with_overrides({"optim.matrix_lr": 0.1 + 0.2})
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest() == config.digest()
    assert again.flat() == config.flat()


def test_a_dictionary_with_faults_is_refused_with_all_of_them() -> None:
    tree = TrainConfig().to_dict()
    tree["model"]["depth"] = 3
    tree["optim"]["adam_eps"] = -1
    tree["colour"] = "red"
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_dict(tree)
    faults = str(caught.value)
    assert "model.depth: no such setting" in faults
    assert "optim.adam_eps = -1" in faults
    assert "colour: no such setting" in faults


def test_a_digest_outlives_settings_that_are_added_later() -> None:
    """Only what differs from the defaults is in it: these names were taken before some of the
    settings of today existed."""
    assert TrainConfig().digest() == "44136fa355b3678a"
    changed = TrainConfig().with_overrides({"optim.matrix_lr": 0.02, "model.num_layers": 10})
    text = '{"model.num_layers":10,"optim.matrix_lr":0.02}'
    assert changed.digest() == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_digest_is_short_hex_and_does_not_depend_on_how_settings_are_written() -> None:
    assert re.fullmatch("[0-9a-f]{16}", TrainConfig().digest())
    tree = TrainConfig().to_dict()
    shuffled = {key: dict(reversed(tree[key].items())) for key in reversed(tree)}
    assert TrainConfig.from_dict(shuffled).digest() == TrainConfig().digest()
    one, float_one = ({"optim.matrix_lr": value} for value in (1, 1.0))
    assert TrainConfig().with_overrides(one) == TrainConfig().with_overrides(float_one)
    assert (
        TrainConfig().with_overrides(one).digest()
        == TrainConfig().with_overrides(float_one).digest()
    )


OUTSIDE_THE_DIGEST = {
    "data.dir": "/elsewhere",
    "runtime.device": "cuda",
    "runtime.attention": "flex",
    "runtime.mlp_kernel": "fused",
    "runtime.loss_kernel": "fused",
    "runtime.iha_kernel": "fused",
    "runtime.compile": "off",
    "runtime.compile_cache": "off",
    "runtime.prime_steps": 99,
    "runtime.prime_batches": "shapes",
    "runtime.prime_score": "after",
    "runtime.log_every": 99,
    "runtime.val_every": 99,
    "runtime.checkpoint_seconds": 99.0,
    "runtime.resume": "never",
    "runtime.save_checkpoint": True,
}


@pytest.mark.parametrize("path", OUTSIDE_THE_DIGEST)
def test_how_a_run_is_executed_is_outside_the_digest(path: str) -> None:
    changed = TrainConfig().with_overrides({path: OUTSIDE_THE_DIGEST[path]})
    assert changed != TrainConfig()
    assert changed.digest() == TrainConfig().digest()


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("path", sorted(set(TrainConfig().flat()) - set(OUTSIDE_THE_DIGEST)))
def test_every_other_setting_changes_the_digest(path: str) -> None:
    config = TrainConfig()
    group, leaf = path.split(".")
    changed = config.model_copy(
        update={group: getattr(config, group).model_copy(update={leaf: "something else"})}
    )
    assert changed.digest() != config.digest()


def test_settings_are_frozen_and_survive_pickling() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.model.num_layers = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    error = ConfigError("one\ntwo")
    assert str(pickle.loads(pickle.dumps(error))) == "one\ntwo"


def test_brotli_reaches_levels_that_zlib_does_not() -> None:
    assert CompressConfig(codec="brotli", level=11).level == 11
    with pytest.raises(ValidationError, match=r"compress\.level = 11 is above 9"):
        CompressConfig(codec="zlib", level=11)


def test_every_setting_says_what_it_means() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Settings):
                check(kind)
            else:
                assert field.description and len(field.description) > 8, (model, name)

    check(TrainConfig)


def test_pairs_of_the_command_line_become_typed_values() -> None:
    assert parse_overrides(
        ["optim.matrix_lr=2e-2", "quantize.scheme=int6", "budget.max_steps=null", "data.dir=a=b"]
    ) == {
        "optim.matrix_lr": 0.02,
        "quantize.scheme": "int6",
        "budget.max_steps": None,
        "data.dir": "a=b",
    }


def test_pairs_without_an_equals_sign_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["optim.matrix_lr", "model.num_layers=3", "seed"])
    assert str(caught.value).count("write it as PATH=VALUE") == 2
