"""Clips in standard deviations, with and without a look at the inputs, against plain numpy. CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer_tests.test_gptq import GPTQ, _hessian, _weights
from trainer.config import QuantizeConfig, TrainConfig
from trainer.errors import ConfigError
from trainer.quantize import dequantize, quantize

CLIPS = ("percentile", "search", "sigma", "hessian_sigma", "hessian_search")


def _uneven(rows: int, columns: int, seed: int = 1) -> Tensor:
    """Rows of different sizes, with heavy tails."""
    generator = torch.Generator().manual_seed(seed + 1)
    return _weights(rows, columns, seed) ** 3 * 400 * torch.rand(rows, 1, generator=generator)


def _stored(clip: str, weights: Tensor, hessian: Tensor, **settings: Any) -> Any:
    config = GPTQ.model_copy(update={"clip": clip, **settings})
    return quantize(
        {"blocks.0.mlp.up.weight": weights}, config, {"blocks.0.mlp.up.weight": hessian}
    )


def _scales(clip: str, weights: Tensor, hessian: Tensor, **settings: Any) -> np.ndarray:
    stored = _stored(clip, weights, hessian, **settings)
    return stored.tensors["blocks.0.mlp.up.weight"].arrays["scales"]


def _sigma(weights: np.ndarray, sigmas: float, levels: int) -> np.ndarray:
    return np.maximum(sigmas * weights.std(axis=1, ddof=1) / levels, 1e-10)


@pytest.mark.parametrize(("bits", "levels"), [(4, 7), (5, 15), (6, 31), (7, 63), (8, 127)])
def test_sigma_is_so_many_standard_deviations_over_the_largest_code(bits: int, levels: int) -> None:
    weights = _uneven(9, 50)
    found = _scales("sigma", weights, _hessian(99, 50), matrix_bits=bits, clip_sigmas=9.5)
    expected = _sigma(weights.double().numpy(), 9.5, levels)
    np.testing.assert_allclose(found, expected, rtol=6e-4)
    assert len(set(found.tolist())) == 9


def test_codes_are_bounded_by_their_range_alone() -> None:
    weights = _weights(4, 400)
    weights[2, 9] = 5.0  # beyond 3 standard deviations of its row
    config = QuantizeConfig(scheme="int6", clip="sigma", clip_sigmas=3.0, keep_float_max_numel=0)
    stored = quantize({"w": weights}, config).tensors["w"].arrays
    scales = stored["scales"].astype(np.float64)[:, None]
    expected = np.clip(np.round(weights.double().numpy() / scales), -31, 31)
    np.testing.assert_array_equal(stored["codes"], expected)
    assert stored["codes"][2, 9] == 31


def test_hessian_sigma_follows_the_weight_of_a_row_on_the_inputs() -> None:
    weights, hessian = _uneven(7, 40), _hessian(160, 40)
    plain, moments = weights.double().numpy(), hessian.double().diagonal().numpy()
    weight = (np.abs(plain) * moments).mean(axis=1)
    factor = 1 + 0.4 * (weight / weight.mean() - 1)
    found = _scales("hessian_sigma", weights, hessian, hessian_clip_lambda=0.4, clip_sigmas=8.0)
    np.testing.assert_allclose(found, _sigma(plain, 8.0, 31) * factor, rtol=6e-4)
    assert factor.max() > 1.05 and factor.min() < 0.95


def test_hessian_sigma_with_lambda_zero_is_sigma() -> None:
    weights, hessian = _uneven(7, 40), _hessian(160, 40)
    found = _scales("hessian_sigma", weights, hessian, hessian_clip_lambda=0.0)
    np.testing.assert_array_equal(found, _scales("sigma", weights, hessian))


@pytest.mark.parametrize("seed", range(4))
def test_hessian_search_takes_the_width_with_the_least_weighted_error(seed: int) -> None:
    weights, hessian = _uneven(6, 60, seed), _hessian(200, 60, seed)
    plain, moments = weights.double().numpy(), hessian.double().diagonal().numpy()
    errors = {}
    for width in np.linspace(0.2, 1.4, 7):
        scales = _sigma(plain, 12.85 * width, 31).astype(np.float16)
        step = scales.astype(np.float64)[:, None]
        decoded = np.clip(np.round(plain / step), -31, 31) * step
        errors[width] = ((plain - decoded) ** 2 * moments).sum()
    best = min(errors, key=lambda width: errors[width])
    found = _scales("hessian_search", weights, hessian, clip_search_low=0.2, clip_search_high=1.4)
    np.testing.assert_allclose(found, _sigma(plain, 12.85 * best, 31), rtol=6e-4)
    assert 0.2 < best < 1.0  # neither end of the grid


def test_tensors_without_inputs_are_clipped_by_sigma() -> None:
    weights = _uneven(5, 30)
    for clip in ("hessian_sigma", "hessian_search"):
        alone = quantize({"w": weights}, GPTQ.model_copy(update={"clip": clip}), {})
        sigma = quantize({"w": weights}, GPTQ.model_copy(update={"clip": "sigma"}))
        np.testing.assert_array_equal(
            alone.tensors["w"].arrays["codes"], sigma.tensors["w"].arrays["codes"]
        )


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", [4, 6, 7])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_never_worse_than_rounding_to_the_same_grid(
    seed: int, bits: int, clip: str
) -> None:
    name = "blocks.0.mlp.up.weight"
    weights, hessian = _uneven(24, 48, seed), _hessian(200, 48, seed)
    stored = _stored(clip, weights, hessian, matrix_bits=bits)
    solved = dequantize(stored)[name].double()
    scales = torch.from_numpy(stored.tensors[name].arrays["scales"]).double()[:, None]
    levels = 2 ** (bits - 1) - 1
    rounded = (weights.double() / scales).round().clamp(-levels, levels) * scales
    losses = []
    for decoded in (solved, rounded):
        error = weights.double() - decoded
        losses.append((error @ hessian.double() * error).sum(1))
    assert (losses[0] <= losses[1] * (1 + 1e-9)).all()
    assert losses[0].sum() < 0.9 * losses[1].sum()


def test_every_kind_of_tensor_has_its_bits_and_its_sigmas() -> None:
    config = QuantizeConfig(
        scheme="int6",
        embed_bits=7,
        qk_bits=8,
        mlp_bits=5,
        embed_clip_sigmas=14.0,
        attn_clip_sigmas=13.0,
        mlp_clip_sigmas=11.5,
        qk_clip_sigmas=10.0,
    )
    expected = {
        "tok_emb.weight": (7, 14.0),
        "blocks.3.attn.q.weight": (8, 10.0),
        "blocks.3.attn.k.weight": (8, 10.0),
        "blocks.3.attn.v.weight": (6, 13.0),
        "blocks.3.attn.out.weight": (6, 13.0),
        "blocks.3.mlp.down.weight": (5, 11.5),
        "bigram.proj.weight": (6, 12.85),
    }
    for name, (bits, sigmas) in expected.items():
        assert config.bits_of(name, 11) == bits
        assert config.for_tensor(name).clip_sigmas == sigmas
    inherited = QuantizeConfig(attn_bits=5, attn_clip_sigmas=9.0)
    assert inherited.bits_of("blocks.0.attn.q.weight", 2) == 5
    assert inherited.for_tensor("blocks.0.attn.q.weight").clip_sigmas == 9.0


def test_sigmas_reach_the_tensors_of_their_kind() -> None:
    names = ("tok_emb.weight", "blocks.0.attn.v.weight", "blocks.0.mlp.up.weight")
    state = {name: _weights(8, 64, seed) for seed, name in enumerate(names)}
    config = QuantizeConfig(
        clip="sigma", keep_float_max_numel=0, embed_clip_sigmas=20.0, attn_clip_sigmas=5.0
    )
    stored = quantize(state, config).tensors
    for name, sigmas in zip(names, (20.0, 5.0, 12.85), strict=True):
        expected = _sigma(state[name].double().numpy(), sigmas, 127)
        np.testing.assert_allclose(stored[name].arrays["scales"], expected, rtol=6e-4)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"clip": "hessian_sigma"}, r'quantize\.clip = "hessian_sigma" needs the inputs.*"gptq"'),
        ({"clip": "hessian_search", "method": "gptq", "qat_start": 0.5}, r"quantize\.qat_start"),
        ({"awq_groups": 1}, r"quantize\.awq_groups = 1 needs the inputs"),
        ({"clip_search_low": 2.0}, r"quantize\.clip_search_low = 2 is above"),
    ],
)
def test_rules_that_cannot_work_are_refused(settings: dict[str, Any], fault: str) -> None:
    overrides = {f"quantize.{field}": value for field, value in settings.items()}
    with pytest.raises(ConfigError, match=fault):
        TrainConfig().with_overrides({**overrides, "quantize.reserve_seconds": 5.0})
