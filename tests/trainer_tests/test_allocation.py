"""Steps shared out among matrices: the proxy against the true loss, and never over the cap. CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer_tests.test_calibration import CPU_GROUP, _batches, _model
from tests.trainer_tests.test_loop import Collector, configure, data_dir  # noqa: F401
from trainer import artifact
from trainer.compress import coded_size
from trainer.config import TrainConfig
from trainer.errors import ArtifactError
from trainer.quantize.allocation import Packer
from trainer.quantize.calibration import collect_hessians
from trainer.quantize.per_row import as_rows
from trainer.quantize.sensitivity import (
    Sensitivities,
    increase,
    row_sensitivities,
)

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
