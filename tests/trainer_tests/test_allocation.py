"""Steps shared out among matrices: the proxy against the true loss, and never over the cap. CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer_tests.small_data import VOCAB_SIZE
from tests.trainer_tests.small_recipes import SMALL
from tests.trainer_tests.test_calibration import CPU_GROUP, _batches, _model
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer import artifact
from trainer.code import packed_code, unpacked_code
from trainer.compress import coded_size
from trainer.config import TrainConfig
from trainer.errors import ArtifactError, ConfigError
from trainer.loop import train
from trainer.quantize import dequantize
from trainer.quantize.allocation import Packer
from trainer.quantize.calibration import collect_hessians
from trainer.quantize.per_row import as_rows
from trainer.quantize.sensitivity import (
    Sensitivities,
    increase,
    measured_factors,
    row_sensitivities,
)
from trainer.recipes import RECIPES

CODED: dict[str, Any] = {
    "quantize.method": "gptq",
    "quantize.reserve_seconds": 1.0,
    "quantize.allocate": "rate_distortion",
    "quantize.keep_float_max_numel": 100,
    "compress.codec": "rans_classes",
    "compress.level": 9,
}


def _settings(**overrides: Any) -> TrainConfig:
    return TrainConfig().with_overrides({**CODED, **overrides})


def _state(seed: int) -> dict[str, Tensor]:
    """Matrices of several shapes, rows of unequal spread, and some floats."""
    torch.manual_seed(seed)
    state = {"tok_emb.weight": torch.randn(70, 32), "blocks.0.attn_scale": torch.ones(32)}
    for layer in range(1):
        for name, shape in (("attn.q", (32, 32)), ("mlp.up", (64, 32)), ("mlp.down", (32, 64))):
            spread = torch.rand(shape[0], 1).exp() * 0.05
            state[f"blocks.{layer}.{name}.weight"] = torch.randn(shape) * spread
    return state


def _packer(seed: int, config: TrainConfig) -> Packer:
    state = _state(seed)
    names = [name for name, tensor in state.items() if tensor.dim() == 2]
    hessians, rows = {}, {}
    for name in names:
        columns = state[name].size(1)
        inputs = torch.randn(300, columns) @ torch.randn(columns, columns) / columns**0.5
        hessians[name] = inputs.T @ inputs / len(inputs)
        rows[name] = torch.rand(state[name].size(0)).exp().pow(3).expand(2, -1) * 1e-3
    del hessians["tok_emb.weight"]
    return Packer(
        state,
        config.quantize,
        hessians,
        Sensitivities(rows, dict.fromkeys(names, 1.0)),
        partial(coded_size, config=config.compress),
    )


@pytest.mark.parametrize(
    ("seed", "codec"), [*enumerate(["rans_classes", "brotli", "zstd", "brotli"])]
)
def test_no_cap_is_ever_passed_and_most_of_it_is_used(seed: int, codec: str) -> None:
    overrides: dict[str, Any] = {"compress.codec": codec, "quantize.scale_bits": 8 * (1 + seed % 2)}
    if seed == 3:
        overrides["compress.grouping"] = "role_sorted"
    config = _settings(**overrides)
    packer, encode = _packer(seed, config), partial(artifact.encode, config=config)
    losses = []
    for cap in (3_400, 3_801, 4_503, 5_900):
        blob = packer.pack(cap, encode)
        assert 0.98 * cap < len(blob) <= cap  # one step of one matrix here is 1 % of the whole
        assert blob == encode(packer.state)
        losses.append(packer.increase)
    assert losses == sorted(losses, reverse=True)  # more bytes, less loss


def test_factors_of_low_rank_stay_where_they_pay_and_only_there() -> None:
    """Noise is no matrix of low rank, and one column that steps clip or drown is."""
    config = _settings(**{"quantize.low_rank": "float16", "quantize.low_rank_rank": 1})
    for pays in (False, True):
        packer, encode = _packer(1, config), partial(artifact.encode, config=config)
        matrix = packer._matrices[1]
        if pays:
            packer._settle(3_000)
            option = packer._chosen[1]
            made = matrix.solved[option]
            codes = made.tensor.arrays["codes"].copy()
            codes[:, 3] += np.sign(codes[:, 3]) + 3
            arrays = {**made.tensor.arrays, "codes": codes}
            matrix.solved[option] = replace(
                made, tensor=replace(made.tensor, arrays=arrays), increase=made.increase * 40
            )
            assert matrix.add_factors(option, matrix.price(option) / 40, lambda data: len(data))
            assert matrix.solved[option].tensor.scheme.endswith("+lr1")
            assert matrix.solved[option].increase < 3 * made.increase
        else:
            blob = packer.pack(4_000, encode)
            assert packer._factored == [] and len(blob) <= 4_000


def test_more_bytes_than_help_are_left_and_too_few_are_an_error() -> None:
    config = _settings()
    packer, encode = _packer(1, config), partial(artifact.encode, config=config)
    ample = packer.pack(200_000, encode)
    assert len(ample) < 12_000
    with pytest.raises(ArtifactError, match=r"more than the 1,200 that budget.artifact_bytes"):
        packer.pack(1_200, encode)


def _shares(model: Any, inputs: list[Tensor]) -> Tensor:
    """Log-probabilities of every next token, fp64."""
    with torch.no_grad():
        return torch.stack([model.logits(x).double().log_softmax(-1) for x in inputs])


def test_the_proxy_predicts_true_losses_of_rounded_weights() -> None:
    """Every matrix, two steps. The true increase on text that the model itself would write, where
    its gradient is 0 as after training, is the divergence of the rounded model from it."""
    model, inputs = _model(), [x for x, _ in _batches(24)]
    names = [name for name, p in model.named_parameters() if p.dim() == 2 and p.numel() > 100]
    hessians = collect_hessians(model, names, [(x, x) for x in inputs], CPU_GROUP)
    rows = row_sensitivities(model, model.logits, names, inputs * 8, hessians, CPU_GROUP, 0)
    plain = _shares(model, inputs)
    found, expected = [], []
    for name in names:
        parameter = model.get_parameter(name)
        weights = parameter.detach().clone()
        for width in (0.1, 0.2):
            step = width * weights.std()
            rounded = (weights / step).round() * step
            parameter.data.copy_(rounded)
            now = _shares(model, inputs)
            parameter.data.copy_(weights)
            found.append(float((plain.exp() * (plain - now)).sum(-1).mean()))
            matrices = as_rows(weights), as_rows(rounded)
            expected.append(increase(rows[name].mean(0), *matrices, hessians[name]))
    ratios = np.array(found) / np.array(expected)
    assert 0.6 < np.median(ratios) < 1.6
    assert np.corrcoef(np.log(expected), np.log(found))[0, 1] > 0.9


def test_factors_put_the_proxy_right_where_it_is_off_by_one() -> None:
    model, batches = _model(), _batches(6)
    names = ["blocks.0.mlp.up.weight", "blocks.1.mlp.down.weight", "blocks.0.attn.out.weight"]
    kinds = dict(zip(names, ("mlp", "mlp", "attn"), strict=True))
    hessians = collect_hessians(model, names, batches, CPU_GROUP)
    inputs = [x for x, _ in batches]
    rows = row_sensitivities(model, model.logits, names, inputs * 9, hessians, CPU_GROUP, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    right = measured_factors(model, model.logits, kinds, rows, hessians, inputs, CPU_GROUP)
    halved = {name: row_2R / 2 for name, row_2R in rows.items()}
    doubled = measured_factors(model, model.logits, kinds, halved, hessians, inputs, CPU_GROUP)
    assert right[names[0]] == right[names[1]] != right[names[2]]
    for name in names:
        assert doubled[name] == pytest.approx(2 * right[name])
        assert 0.3 < right[name] < 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


TRAINED = {
    "quantize.method": "gptq",
    "quantize.keep_float_max_numel": 100,
    "quantize.calibration_tokens": 512,
    "quantize.allocate_tokens": 1024,
    "compress.codec": "rans_classes",
    "compress.level": 9,
    "budget.max_steps": 20,
    "runtime.save_checkpoint": True,
}


def test_a_run_fills_its_budget_and_beats_uniform_steps_of_as_many_bytes(
    configure: Callable[..., TrainConfig],  # noqa: F811
    tmp_path: Path,
) -> None:
    plain = configure(**TRAINED, **{"quantize.clip": "sigma"})
    uniform = train(plain, Collector(), tmp_path / "uniform")
    assert uniform.bytes_model is not None
    shared = plain.with_overrides(
        {
            "quantize.allocate": "rate_distortion",
            "source.checkpoint": str(tmp_path / "uniform" / "checkpoint.bin"),
        }
    )
    cap = len(packed_code(shared)) + uniform.bytes_model
    reporter = Collector()
    result = train(
        shared.with_overrides({"budget.artifact_bytes": cap}), reporter, tmp_path / "shared"
    )
    assert result.bytes_total is not None and 0.99 * cap < result.bytes_total <= cap
    assert result.val_loss is not None and uniform.val_loss is not None
    assert result.val_loss < uniform.val_loss
    assert any(record["line"].startswith("allocate: ") for record in reporter.of("log"))
    assert result.phases["calibrate"] > 0  # reads training text: inside the budget's clock
    _, stored = artifact.decode((tmp_path / "shared" / "artifact.bin").read_bytes())
    assert {t.scheme for t in stored.tensors.values()} > {"float32"}
    dequantize(stored)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pr1212", "pr1894", "frontier"])
def test_small_copies_of_the_recipes_fit_by_it(
    recipe: str,
    data_dir: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Tables without inputs, gates, shared blocks, lanes, documents, compact scales, streams by
    role."""
    config = (
        RECIPES[recipe]
        .build()
        .with_overrides(
            {
                **SMALL[recipe],
                **({"data.loader": "sequential"} if recipe == "pr1212" else {}),
                "model.vocab_size": VOCAB_SIZE,
                "data.dir": str(data_dir),
                "budget.max_steps": 2,
                "quantize.calibration_tokens": 512,
                "quantize.allocate": "rate_distortion",
                "quantize.allocate_tokens": 512,
                "evaluate.ttt": "off",
                "evaluate.stride": 0,
                "evaluate.prequant": False,
                "runtime.prime_steps": 0,
                "compress.codec": "rans_classes",
                "compress.level": 9,
                "compress.code": "modules",
            }
        )
    )
    cap = len(packed_code(config)) + 30_000
    result = train(
        config.with_overrides({"budget.artifact_bytes": cap}), Collector(), tmp_path / "out"
    )
    assert result.bytes_model is not None and 29_000 < result.bytes_model <= 30_000
    assert result.val_bpb is not None and result.val_bpb < 20


def test_off_it_leaves_no_trace(configure: Callable[..., TrainConfig]) -> None:  # noqa: F811
    config = configure()
    off = config.with_overrides({"quantize.allocate": "off", "quantize.allocate_tokens": 262_144})
    assert off.digest() == config.digest() and off.without_places() == config.without_places()
    code = unpacked_code(packed_code(config))
    for module in ("allocation", "rate_distortion", "sensitivity"):
        source = code.get(f"trainer/quantize/{module}.py", "class Left:pass")
        assert len(source) < 200 and "def " not in source


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"quantize.method": "round"}, 'set it to "gptq"'),
        ({"quantize.qat_start": 0.5}, "set quantize.qat_start = 1"),
        ({"quantize.awq_groups": 1}, "set it to 0"),
        ({"quantize.prune_to_fit": True}, "set it to false"),
        ({"budget.artifact_bytes": None}, "which is null; set it"),
    ],
)
def test_settings_that_contradict_it_are_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _settings(**overrides)
