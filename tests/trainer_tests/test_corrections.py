"""Columns at 8 bits, low-rank factors, gates, and the compact forms of scales and control tensors,
each against plain numpy. CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer_tests.test_clip_rules import _uneven
from tests.trainer_tests.test_gptq import GPTQ, _hessian, _plain_gptq, _weights
from trainer import artifact
from trainer.config import QuantizeConfig, TrainConfig
from trainer.errors import ArtifactError
from trainer.quantize import QuantizedState, QuantizedTensor, dequantize, find_scheme, quantize
from trainer.quantize.awq import choose_groups
from trainer.quantize.low_rank import LowRank
from trainer.quantize.per_row import PerRow

Q, UP = "blocks.7.attn.q.weight", "blocks.7.mlp.up.weight"


def _through_a_file(quantized: QuantizedState) -> dict[str, Tensor]:
    return dequantize(artifact.decode(artifact.encode(quantized, TrainConfig()))[1])


def test_awq_takes_the_groups_with_the_largest_inputs_times_weights() -> None:
    weights = {"a": _uneven(6, 40, 1), "b": _uneven(9, 24, 2), "no_inputs": _weights(4, 8)}
    hessians = {"a": _hessian(99, 40), "b": _hessian(99, 24, 1)}
    scores = {
        (name, start): sum(
            float(hessian[j, j]) ** 0.5 * float(weights[name][:, j].double().abs().mean())
            for j in range(start, start + 16)
        )
        for name, hessian in hessians.items()
        for start in range(0, hessian.size(0) - 15, 16)
    }
    assert len(scores) == 3
    for count in (1, 2, 3):
        best = sorted(scores, key=lambda key: -float(scores[key]))[:count]
        expected = {name: tuple(sorted(s for n, s in best if n == name)) for name, _ in best}
        assert choose_groups(weights, hessians, count, 16) == expected


@pytest.mark.parametrize("act_order", [True, False])
def test_awq_columns_are_solved_together_with_the_others(act_order: bool) -> None:
    """One sweep over all columns, each with the scales and the range of its own."""
    weights, hessian = _weights(5, 32), _hessian(120, 32)
    weights[:, 8:16] *= 30  # the group to be found
    config = GPTQ.model_copy(
        update={"clip": "sigma", "clip_sigmas": 4.0, "awq_groups": 1, "awq_group_size": 8}
    ).model_copy(update={"act_order": act_order})
    stored = quantize({"w": weights}, config, {"w": hessian}).tensors["w"]
    assert stored.scheme == "int6+hi1x8" and stored.arrays["high_starts"].tolist() == [8]
    std = weights.double().numpy().std(axis=1, ddof=1)
    own = weights[:, 8:16].double().numpy().std(axis=1, ddof=1)
    np.testing.assert_allclose(stored.arrays["scales"], 4 * std / 31, rtol=6e-4)
    np.testing.assert_allclose(stored.arrays["high_scales"][0], 4 * own / 127, rtol=6e-4)
    expected = _two_grids(weights.numpy(), stored.arrays, hessian.numpy(), config)
    np.testing.assert_array_equal(stored.arrays["codes"], expected)
    scales = np.repeat(stored.arrays["scales"].astype(np.float32)[:, None], 32, axis=1)
    scales[:, 8:16] = stored.arrays["high_scales"][0].astype(np.float32)[:, None]
    decoded = _through_a_file(quantize({"w": weights}, config, {"w": hessian}))["w"]
    np.testing.assert_array_equal(decoded, stored.arrays["codes"] * scales)


def _two_grids(weights: np.ndarray, arrays: Any, hessian: np.ndarray, config: Any) -> np.ndarray:
    """The plain column-by-column solution, row by row, with columns 8 to 16 on their own grid."""
    codes = np.zeros(weights.shape, int)
    hessian = hessian.astype(np.float64)
    damped = hessian + config.damping * np.diag(hessian).mean() * np.eye(len(hessian))
    order = list(range(len(hessian)))
    if config.act_order:
        order.sort(key=lambda column: -hessian[column, column])
    for row in range(len(weights)):
        left = weights[row].astype(np.float64).copy()
        for index, column in enumerate(order):
            high = 8 <= column < 16
            scale = float(arrays["high_scales"][0, row] if high else arrays["scales"][row])
            levels = 127 if high else 31
            codes[row, column] = np.clip(np.round(left[column] / scale), -levels, levels)
            rest = order[index:]
            inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
            error = left[column] - codes[row, column] * scale
            left[rest] -= error / inverse[0, 0] * inverse[0]
        scales = np.full(len(hessian), float(arrays["scales"][row]))
        scales[8:16] = float(arrays["high_scales"][0, row])
        most = np.where((np.arange(len(hessian)) // 8) == 1, 127, 31)
        rounded = np.clip(np.round(weights[row].astype(np.float64) / scales), -most, most)
        losses = [
            (e @ hessian @ e)
            for e in (weights[row] - codes[row] * scales, weights[row] - rounded * scales)
        ]
        if losses[1] < losses[0]:
            codes[row] = rounded
    return codes


def test_awq_lowers_the_error_of_the_outputs() -> None:
    weights, size = _weights(40, 64), torch.ones(64)
    size[32:40] = 30.0
    hessian = _hessian(300, 64) * size * size[:, None]
    losses = {}
    for count in (0, 1):
        config = GPTQ.model_copy(update={"awq_groups": count, "awq_group_size": 8})
        error = (
            weights - dequantize(quantize({"w": weights}, config, {"w": hessian}))["w"]
        ).double()
        losses[count] = float((error @ hessian.double() * error).sum())
    assert losses[1] < 0.7 * losses[0]


def test_awq_columns_outside_the_matrix_are_refused() -> None:
    scheme = PerRow(31, num_high=1, high_columns=8)
    good = {
        "codes": np.zeros((3, 16), np.int8),
        "scales": np.ones(3, "<f2"),
        "high_starts": np.array([8], "<i2"),
        "high_scales": np.ones((1, 3), "<f2"),
    }
    assert scheme.decode(good, (3, 16)).shape == (3, 16)
    for start in (-1, 9, 16, 32767):
        with pytest.raises(ArtifactError, match=f"begin at {start} in a matrix of 16"):
            scheme.decode({**good, "high_starts": np.array([start], "<i2")}, (3, 16))


def _config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(scheme="int6", keep_float_max_numel=0, **settings)


def test_qres_adds_the_best_approximation_of_what_rounding_took() -> None:
    weights = _weights(20, 30)
    plain = dequantize(quantize({Q: weights}, _config()))[Q].double().numpy()
    residual = weights.double().numpy() - plain
    u, s, v = np.linalg.svd(residual, full_matrices=False)
    found = _through_a_file(quantize({Q: weights}, _config(low_rank="float16", low_rank_rank=2)))
    np.testing.assert_allclose(found[Q], plain + (u[:, :2] * s[:2]) @ v[:2], atol=2e-5)
    after = np.linalg.norm(weights.double().numpy() - found[Q].double().numpy())
    assert after == pytest.approx(np.sqrt((s[2:] ** 2).sum()), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [7, 32, 1000])
def test_lqer_factors_are_coded_as_published(group: int, seed: int) -> None:
    weights = _uneven(20, 30, seed)
    config = _config(matrix_bits=4, low_rank="asymmetric", low_rank_rank=3, low_rank_group=group)
    plain = dequantize(quantize({UP: weights}, _config(matrix_bits=4)))[UP].double().numpy()
    residual = weights.double().numpy() - plain
    u, s, v = np.linalg.svd(residual, full_matrices=False)
    left, right = u[:, :3] * s[:3], v[:3].ravel()
    left_scale = np.float16(np.abs(left).max() / 1.5)
    left_codes = np.clip(np.round(left / np.float64(left_scale)), -2, 1)
    decoded = np.empty_like(right)
    for start in range(0, len(right), group):
        part = right[start : start + group]
        scale = np.float64(np.float16(np.abs(part).max() / 7.5))
        decoded[start : start + group] = np.clip(np.round(part / scale), -8, 7) * scale
    product = left_codes * np.float64(left_scale) @ decoded.reshape(3, 30)
    stored = quantize({UP: weights}, config)
    assert stored.tensors[UP].scheme == f"int4+lr3g{group}"
    codes = stored.tensors[UP].arrays
    assert codes["left"].min() >= -2 and codes["left"].max() <= 1
    assert codes["right"].min() >= -8 and codes["right"].max() <= 7
    np.testing.assert_allclose(_through_a_file(stored)[UP], plain + product, atol=1e-5)


def test_low_rank_goes_to_the_matrices_with_the_largest_error() -> None:
    state = {f"blocks.{i}.mlp.up.weight": _weights(16, 16, i) * (i + 1) for i in range(4)}
    stored = quantize(state, _config(low_rank="float16", low_rank_top_k=2)).tensors
    assert [name for name, t in stored.items() if "+lr" in t.scheme] == list(state)[2:]
    all_of_them = quantize(state, _config(low_rank="float16", low_rank_top_k=0)).tensors
    assert all(t.scheme == "int6+lr4" for t in all_of_them.values())


def test_low_rank_keeps_to_its_targets() -> None:
    state = {
        name: _weights(16, 16, seed)
        for seed, name in enumerate(
            ("tok_emb.weight", "blocks.6.attn.q.weight", Q, "blocks.7.attn.k.weight", UP)
        )
    }
    config = _config(
        low_rank="float16", low_rank_targets="qk", low_rank_from_layer=7, low_rank_top_k=0
    )
    chosen = [n for n, t in quantize(state, config).tensors.items() if "+lr" in t.scheme]
    assert chosen == [Q, "blocks.7.attn.k.weight"]


def test_factors_that_make_it_worse_are_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right_way = LowRank._factors
    monkeypatch.setattr(LowRank, "_factors", lambda self, residual: right_way(self, -residual))
    lines: list[str] = []
    stored = quantize({UP: _weights(9, 9)}, _config(low_rank="float16"), log=lines.append)
    assert stored.tensors[UP].scheme == "int6" and "stays without factors" in lines[0]


@pytest.mark.parametrize("kind", ["float16", "asymmetric"])
def test_low_rank_never_raises_the_error_of_the_outputs(kind: str) -> None:
    for seed in range(6):
        weights, hessian = _uneven(24, 48, seed), _hessian(200, 48, seed)
        losses = []
        for low_rank in ("off", kind):
            config = GPTQ.model_copy(update={"low_rank": low_rank, "matrix_bits": 4})
            decoded = dequantize(quantize({UP: weights}, config, {UP: hessian}))[UP]
            error = (weights - decoded).double()
            losses.append(float((error @ hessian.double() * error).sum()))
        assert losses[1] <= losses[0]


def test_scales_of_a_byte_are_multiples_of_one_step_and_codes_are_made_for_them() -> None:
    weights = _uneven(30, 40)
    weights[4] *= 1e-4  # its scale is less than half a step
    wide = quantize({"w": weights}, _config(clip="sigma")).tensors["w"].arrays
    stored = quantize({"w": weights}, _config(clip="sigma", scale_bits=8))
    arrays = stored.tensors["w"].arrays
    scales = wide["scales"].astype(np.float64)
    step = np.float64(np.float16(scales.max() / 255))
    assert arrays["step"][0] == step and arrays["multiples"].dtype == np.uint8
    multiples = np.clip(np.round(scales / step), 1, 255)
    np.testing.assert_array_equal(arrays["multiples"], multiples)
    codes = np.clip(np.round(weights.double().numpy() / (multiples * step)[:, None]), -31, 31)
    np.testing.assert_array_equal(arrays["codes"], codes)
    decoded = _through_a_file(stored)["w"]
    np.testing.assert_allclose(decoded, codes * (multiples * step)[:, None], rtol=1e-6)


def test_scales_of_a_byte_work_with_gptq() -> None:
    weights, hessian = _uneven(6, 20), _hessian(90, 20)
    config = GPTQ.model_copy(update={"scale_bits": 8})
    arrays = quantize({"w": weights}, config, {"w": hessian}).tensors["w"].arrays
    scales = arrays["multiples"].astype(np.float32) * np.float32(arrays["step"][0])
    expected = _plain_gptq(weights.numpy(), scales, hessian.numpy(), 31, config)
    np.testing.assert_array_equal(arrays["codes"], expected)


def test_rows_of_zeros_survive_every_form() -> None:
    for settings in (
        {"scale_bits": 8},
        {"scale_bits": 8, "clip": "sigma"},
        {"low_rank": "float16"},
    ):
        decoded = dequantize(quantize({"w": torch.zeros(4, 6)}, _config(**settings)))["w"]
        assert torch.equal(decoded, torch.zeros(4, 6))


def test_control_tensors_of_128_elements_become_bytes_and_smaller_ones_stay() -> None:
    state = {
        "blocks.0.attn_scale": torch.randn(128, generator=torch.Generator().manual_seed(0)),
        "blocks.0.resid_mix": _weights(2, 64),
        "blocks.0.mlp_scale": _weights(1, 127)[0],
    }
    stored = quantize(state, QuantizeConfig(control_bits=8))
    schemes = {name: t.scheme for name, t in stored.tensors.items()}
    assert list(schemes.values()) == ["flat8", "flat8", "float32"]
    decoded = _through_a_file(stored)
    for name in ("blocks.0.attn_scale", "blocks.0.resid_mix"):
        values = state[name].double().numpy()
        scale = np.float64(np.float16(np.abs(values).max() / 127))
        expected = np.clip(np.round(values / scale), -127, 127) * scale
        np.testing.assert_allclose(decoded[name], expected, rtol=1e-6)
    assert torch.equal(decoded["blocks.0.mlp_scale"], state["blocks.0.mlp_scale"])


def test_gates_keep_their_largest_weight_on_the_largest_code() -> None:
    gate = _uneven(8, 12)
    state = {"blocks.0.attn.gate.weight": gate, "skip_gates": _weights(2, 8)}
    config = QuantizeConfig(clip="sigma", gate_bits=8)
    stored = quantize(state, config).tensors
    assert stored["skip_gates"].scheme == "float32"
    assert stored["blocks.0.attn.gate.weight"].scheme == "int8"
    scales = stored["blocks.0.attn.gate.weight"].arrays["scales"]
    np.testing.assert_allclose(scales, gate.abs().amax(1) / 127, rtol=6e-4)
    assert (
        quantize(state, QuantizeConfig()).tensors["blocks.0.attn.gate.weight"].scheme == "float16"
    )


@pytest.mark.parametrize(
    "name",
    ["", "int6+", "int9", "int6+hi0x64", "int6+hi1x", "int6+u8+u8", "int6+lr0", "float16+u8",
     "int6+lr4g0", "int6+lr99999", "int6+hi1x64\n", "int6 +u8", "int6+lr4+u8", "int6+hi\u0661x8"],
)  # fmt: skip
def test_names_of_schemes_that_nobody_writes_are_refused(name: str) -> None:
    assert find_scheme(name) is None


def test_names_of_schemes_that_are_written_are_found() -> None:
    assert find_scheme("int6+u8+hi2x64+lr4g32") == LowRank(PerRow(31, True, 2, 64), 4, 32)
    assert find_scheme("int7+lr1") == LowRank(PerRow(63), 1)


@pytest.mark.parametrize("scheme", ["int6+u8+hi2x8", "int4+lr3", "int8+u8+hi1x4+lr2g5", "flat8"])
def test_arrays_of_extended_schemes_are_what_their_layout_announces(scheme: str) -> None:
    found = find_scheme(scheme)
    assert found is not None
    weights = _uneven(9, 16)
    if isinstance(found, LowRank):
        base, starts = found.base, (4,) * found.base.num_high
        arrays = found.extended(weights, base.encode(weights, _config(), None, starts))
    elif isinstance(found, PerRow):
        arrays = found.encode(weights, _config(), None, (0, 8))
    else:
        arrays = found.encode(weights, _config())
    layout = found.layout((9, 16))
    assert list(arrays) == list(layout)
    for part, spec in layout.items():
        assert (arrays[part].dtype.str, arrays[part].shape) == (spec.dtype, spec.shape), part
    state = QuantizedState({"w": QuantizedTensor(scheme, (9, 16), arrays)})
    decoded = _through_a_file(state)["w"].numpy()
    np.testing.assert_array_equal(decoded, found.decode(arrays, (9, 16)))
    assert np.abs(decoded - weights.numpy()).max() < 0.5 * weights.abs().max()
