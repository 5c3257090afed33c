"""GPTQ: codes that keep a matrix's outputs, not its weights, close to what they were.

For W with inputs X and H = X^T X / n it lowers tr((W - Q) H (W - Q)^T): columns are rounded one
after another, and the later ones move so as to make up for the error of each. The scales of the
rows are fixed before, so codes, stored numbers and decoder are those of plain rounding.

Frantar et al., https://arxiv.org/abs/2210.17323; settings of openai/parameter-golf #1019, #1394.

Legend: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.quantize.grid import Grid, divisor
from trainer.quantize.per_row import PerRow, as_rows

BLOCK_COLUMNS = 128
"""Columns that are solved before the columns after them are brought up to date."""
TRIES = 4
"""Factorisations with ten times the damping each, before a matrix is given up."""


@dataclass(frozen=True)
class Factor:
    """What the solution needs of a Hessian."""

    order_C: Tensor
    """Columns in the order in which they are rounded."""
    upper_CC: Tensor
    """Cholesky factor of the damped inverse, in that order, fp64."""
    dead_C: Tensor
    """Columns whose inputs are always 0."""

    def expected_error(self) -> float:
        """(w - q) H (w - q)^T of a row whose rounding errors have mean square 1: the error of each
        column is made up for by the later ones but for 1 / upper_jj^2 of it."""
        return float(self.upper_CC.diagonal().pow(-2).sum())


def encode_gptq(
    tensor: Tensor,
    scheme: PerRow,
    config: QuantizeConfig,
    hessian_CC: Tensor,
    starts: tuple[int, ...] = (),
) -> dict[str, np.ndarray] | None:
    """The arrays of a tensor, as `scheme.encode` gives them; None when the Hessian cannot be
    factorised (too little calibration).

    A row that is closer after plain rounding keeps that: the method is greedy, so on its own
    objective it may lose, rarely and by little.

    Args:
        config: of this tensor (`QuantizeConfig.for_tensor`).
        hessian_CC: symmetric, mean of x x^T over calibration tokens, on the tensor's device.
        starts: first columns of the scheme's groups at 8 bits.
    """
    weights_RC = as_rows(tensor)
    grid = scheme.grid(weights_RC, config, hessian_CC.diagonal(), starts)
    factor = factorise(hessian_CC, config)
    if factor is None:
        return None
    codes_RC = best_codes(weights_RC, grid, scheme.levels, hessian_CC, factor)
    return scheme.arrays(codes_RC, grid, tuple(tensor.shape))


def best_codes(
    weights_RC: Tensor, grid: Grid, levels: int, hessian_CC: Tensor, factor: Factor
) -> Tensor:
    """GPTQ's codes, int8; of each row the rounded ones where those are closer."""
    codes_RC = grid.codes(weights_RC, levels)
    solved_RC = _solved_codes(weights_RC, grid, levels, factor)
    loss_of_solved_R = output_error(weights_RC, solved_RC, grid, hessian_CC)
    loss_of_rounded_R = output_error(weights_RC, codes_RC, grid, hessian_CC)
    is_better_R1 = (loss_of_solved_R <= loss_of_rounded_R)[:, None]
    return torch.where(is_better_R1, solved_RC, codes_RC)


def gptq_codes(
    weights_RC: Tensor, grid: Grid, levels: int, hessian_CC: Tensor, config: QuantizeConfig
) -> Tensor | None:
    """Codes, int8, in fp64 arithmetic; None when no damping makes the Hessian positive definite."""
    factor = factorise(hessian_CC, config)
    return None if factor is None else _solved_codes(weights_RC, grid, levels, factor)


def factorise(hessian_CC: Tensor, config: QuantizeConfig) -> Factor | None:
    """None when no damping makes the Hessian positive definite."""
    hessian_CC = hessian_CC.double().clone()
    diagonal_C = hessian_CC.diagonal()
    dead_C = diagonal_C == 0
    diagonal_C[dead_C] = 1.0
    order_C = torch.arange(len(diagonal_C), device=diagonal_C.device)
    if config.act_order:
        order_C = torch.argsort(diagonal_C, descending=True, stable=True)
    upper_CC = _factor(hessian_CC[order_C][:, order_C], config.damping)
    return None if upper_CC is None else Factor(order_C, upper_CC, dead_C)


def _solved_codes(weights_RC: Tensor, grid: Grid, levels: int, factor: Factor) -> Tensor:
    left_RC = weights_RC.double().masked_fill(factor.dead_C, 0.0)
    order_C = factor.order_C
    levels_C = grid.levels_C(levels, len(order_C))
    codes_RC = _solve(
        left_RC[:, order_C],
        grid.scales_RC(len(order_C))[:, order_C] if grid.high else grid.scales_RC(len(order_C)),
        [levels_C[column] for column in order_C.tolist()],
        factor.upper_CC,
    )
    return codes_RC[:, torch.argsort(order_C)].to(torch.int8)


def output_error(weights_RC: Tensor, codes_RC: Tensor, grid: Grid, hessian_CC: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of each row, [R], fp64."""
    decoded_RC = codes_RC.double() * grid.scales_RC(codes_RC.size(1)).double()
    error_RC = weights_RC.double() - decoded_RC
    return ((error_RC @ hessian_CC.double()) * error_RC).sum(1)


def _factor(hessian_CC: Tensor, damping: float) -> Tensor | None:
    """Upper Cholesky factor of the damped inverse."""
    mean = hessian_CC.diagonal().mean()
    eye_CC = torch.eye(len(hessian_CC), dtype=hessian_CC.dtype, device=hessian_CC.device)
    for attempt in range(TRIES):
        damped_CC = hessian_CC + damping * 10**attempt * mean * eye_CC
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if failed:
            continue
        inverse_CC = torch.cholesky_inverse(lower_CC)
        upper_CC: Tensor
        upper_CC, failed = torch.linalg.cholesky_ex(inverse_CC, upper=True)
        if not failed:
            return upper_CC
    return None


def _solve(left_RC: Tensor, scales_RC: Tensor, levels_C: list[int], factor_CC: Tensor) -> Tensor:
    """Codes as whole fp64 numbers, columns in the order given; `left_RC` is used up."""
    codes_RC = torch.zeros_like(left_RC)
    scales_RC = scales_RC.double()
    divisor_RC = divisor(scales_RC)
    for start in range(0, left_RC.size(1), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, left_RC.size(1))
        block_RB, factor_BB = left_RC[:, start:end], factor_CC[start:end, start:end]
        errors_RB = torch.zeros_like(block_RB)
        for column in range(end - start):
            weights_R = block_RB[:, column]
            levels = levels_C[start + column]
            codes_R = (weights_R / divisor_RC[:, start + column]).round_().clamp_(-levels, levels)
            left_R = weights_R - codes_R * scales_RC[:, start + column]
            errors_R = left_R / factor_BB[column, column]
            block_RB[:, column + 1 :].addr_(errors_R, factor_BB[column, column + 1 :], alpha=-1)
            codes_RC[:, start + column] = codes_R
            errors_RB[:, column] = errors_R
        left_RC[:, end:].addmm_(errors_RB, factor_CC[start:end, end:], alpha=-1)
    return codes_RC
