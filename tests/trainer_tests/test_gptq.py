"""GPTQ against the method written out with a fresh inverse for every column, in fp64. CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.quantize import SCHEMES, dequantize, quantize
from trainer.quantize.gptq import encode_gptq, gptq_codes, output_error
from trainer.quantize.per_row import PerRow

GPTQ = QuantizeConfig(scheme="int6", method="gptq", keep_float_max_numel=0)
LEVELS = {"int8": 127, "int6": 31, "int5": 15}


def _inputs(num_tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs with channels of very different size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(num_tokens, width, generator=generator) @ mixing / width**0.5


def _hessian(num_tokens: int, width: int, seed: int = 0) -> Tensor:
    inputs = _inputs(num_tokens, width, seed)
    return inputs.T @ inputs / num_tokens


def _weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _plain_gptq(
    weights: np.ndarray, scales: np.ndarray, hessian: np.ndarray, levels: int, config: Any
) -> np.ndarray:
    """Optimal brain quantisation in a fixed order: the inverse over the columns that are left is
    made anew for every column; no Cholesky factor, no blocks."""
    weights, hessian = weights.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    weights[:, dead] = 0.0
    width = len(hessian)
    order = list(range(width))
    if config.act_order:
        order.sort(key=lambda column: -hessian[column, column])
    hessian = hessian + config.damping * np.diag(hessian).mean() * np.eye(width)
    codes = np.zeros(weights.shape, dtype=int)
    for index, column in enumerate(order):
        left = order[index:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        for row in range(len(weights)):
            if scales[row] > 0:
                codes[row, column] = np.clip(
                    np.round(weights[row, column] / scales[row]), -levels, levels
                )
            error = weights[row, column] - codes[row, column] * scales[row]
            weights[row, left] -= error / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", LEVELS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (3, 40), (2, 150)])
def test_codes_equal_a_plain_column_by_column_solution(
    scheme: str, act_order: bool, rows: int, columns: int
) -> None:
    config = GPTQ.model_copy(update={"act_order": act_order, "damping": 0.03})
    weights, hessian = _weights(rows, columns), _hessian(4 * columns, columns)
    quantiser = SCHEMES[scheme]
    assert isinstance(quantiser, PerRow)
    grid = quantiser.grid(weights, config)
    found = gptq_codes(weights, grid, LEVELS[scheme], hessian, config)
    assert found is not None
    scales = grid.scales_R.double().numpy()
    expected = _plain_gptq(weights.numpy(), scales, hessian.numpy(), LEVELS[scheme], config)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("clip", ["percentile", "search"])
@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_rounding_on_its_own_objective(seed: int, bits: int, clip: str) -> None:
    config = GPTQ.model_copy(update={"matrix_bits": bits, "clip": clip})
    weights, hessian = _weights(24, 48, seed), _hessian(200, 48, seed)
    hessians = {"w": hessian}
    by_gptq = dequantize(quantize({"w": weights}, config, hessians))["w"]
    rounded = dequantize(quantize({"w": weights}, config.model_copy(update={"method": "round"})))
    losses = []
    for decoded in (by_gptq, rounded["w"]):
        error = (weights - decoded).double()
        losses.append((error @ hessian.double() * error).sum(1))
    assert (losses[0] <= losses[1]).all()
    assert losses[0].sum() < 0.7 * losses[1].sum()


def test_the_objective_is_the_mean_squared_error_of_the_outputs() -> None:
    inputs, weights = _inputs(300, 20), _weights(6, 20)
    quantiser = SCHEMES["int6"]
    assert isinstance(quantiser, PerRow)
    grid = quantiser.grid(weights, GPTQ)
    codes = quantiser.round(weights, grid)
    decoded = torch.from_numpy(quantiser.decode(quantiser.encode(weights, GPTQ), (6, 20)))
    expected = (inputs.double() @ (weights - decoded).double().T).square().mean(0)
    hessian = inputs.double().T @ inputs.double() / 300
    np.testing.assert_allclose(output_error(weights, codes, grid, hessian), expected, rtol=1e-6)


def test_scales_and_decoder_are_those_of_rounding() -> None:
    weights = _weights(12, 30)
    by_gptq = quantize({"w": weights}, GPTQ, {"w": _hessian(90, 30)}).tensors["w"]
    rounded = quantize({"w": weights}, GPTQ).tensors["w"]
    assert by_gptq.scheme == rounded.scheme == "int6"
    np.testing.assert_array_equal(by_gptq.arrays["scales"], rounded.arrays["scales"])
    assert (by_gptq.arrays["codes"] != rounded.arrays["codes"]).any()


def test_inputs_that_are_never_seen_get_the_code_zero() -> None:
    weights, hessian = _weights(4, 12), _hessian(60, 12)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    solved = encode_gptq(weights, PerRow(31), GPTQ, hessian)
    assert solved is not None
    assert (solved["codes"][:, 3] == 0).all()
    assert (solved["codes"][:, 4] != 0).any()


def test_a_hessian_that_is_not_positive_definite_is_damped_tenfold() -> None:
    weights, hessian = _weights(6, 20), _hessian(60, 20)
    mean = hessian.diagonal().mean()
    lowest = torch.linalg.eigvalsh(hessian)[0]
    hessian = hessian - (lowest + 0.05 * mean) * torch.eye(20)  # 0.01 is too little, 0.1 enough
    grid = PerRow(31).grid(weights, GPTQ)
    found = gptq_codes(weights, grid, 31, hessian, GPTQ)
    tenfold = gptq_codes(weights, grid, 31, hessian, GPTQ.model_copy(update={"damping": 0.1}))
    assert found is not None and tenfold is not None
    assert torch.equal(found, tenfold)


def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so() -> None:
    weights = _weights(4, 8)
    hopeless = -torch.eye(8)
    lines: list[str] = []
    found = quantize({"w": weights}, GPTQ, {"w": hopeless}, lines.append).tensors["w"]
    plain = quantize({"w": weights}, GPTQ).tensors["w"]
    np.testing.assert_array_equal(found.arrays["codes"], plain.arrays["codes"])
    assert len(lines) == 1 and "gptq: w is rounded" in lines[0]


def test_rows_whose_scale_is_stored_as_zero_stay_zero() -> None:
    weights = _weights(3, 10)
    weights[1] = 1e-12
    solved = encode_gptq(weights, PerRow(31), GPTQ, _hessian(50, 10))
    assert solved is not None
    assert solved["scales"][1] == 0 and (solved["codes"][1] == 0).all()


def test_the_search_takes_the_candidate_with_the_least_squared_error_in_each_row() -> None:
    weights = _weights(40, 3000)
    weights[5, 7] = 3.0  # one outlier: cutting it off serves the others
    config = QuantizeConfig(scheme="int6", clip="search", keep_float_max_numel=0)
    found = (dequantize(quantize({"w": weights}, config))["w"] - weights).square().sum(1)
    errors = []
    for percentile in (99.9, 99.95, 99.99, 99.999, 100.0):
        fixed = QuantizeConfig(scheme="int6", clip_percentile=percentile, keep_float_max_numel=0)
        decoded = dequantize(quantize({"w": weights}, fixed))["w"]
        errors.append((decoded - weights).square().sum(1))
    best = torch.stack(errors).min(0)
    assert torch.equal(found, best.values)
    assert len(set(best.indices.tolist())) > 1


def test_without_gptq_hessians_are_ignored() -> None:
    weights = _weights(4, 8)
    config = GPTQ.model_copy(update={"method": "round"})
    with_it = quantize({"w": weights}, config, {"w": _hessian(20, 8)}).tensors["w"].arrays
    without = quantize({"w": weights}, config).tensors["w"].arrays
    np.testing.assert_array_equal(with_it["codes"], without["codes"])
