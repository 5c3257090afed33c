"""After training: the step of every matrix, chosen so that the loss grows least in the bytes left.

A matrix may have any of a ladder of steps under three rules for its rows: equal shares of a row's
spread (as SDClip), steps that make an error in each row cost the same (1 / sqrt g_r), and their
geometric mean. After entropy coding the step sets the size; the width of the codes is then the
least that holds them. A rule's steps are rounded to three bits of mantissa, so that they take a few
bits each when packed and the codes are made for what is stored.

Options are judged by plain rounding first: entropy of the codes, and the proxy of sensitivity.py
with the error that GPTQ leaves of it. What is chosen is solved, coded and judged for real, corrects
the curve that it came from, and the choice is made again, until the file as packed fits the cap.

Legend: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from trainer.config import QuantizeConfig
from trainer.config.quantize import takes_low_rank
from trainer.errors import ArtifactError
from trainer.quantize import coded_names, corrected, quantize, untied
from trainer.quantize.gptq import Factor, best_codes, factorise
from trainer.quantize.grid import LARGEST_SCALE, Grid, compact
from trainer.quantize.per_row import PerRow, as_rows
from trainer.quantize.rate_distortion import Curve, allocate
from trainer.quantize.schemes import scheme_named
from trainer.quantize.sensitivity import Sensitivities, increase
from trainer.quantize.state import QuantizedState, QuantizedTensor

Encode = Callable[[QuantizedState], bytes]
CodedSize = Callable[[bytes], float]

RULES = ("spread", "both", "loss")
WIDTHS = tuple(2.0 ** (step / 6) for step in range(-27, 7))
"""Steps, in standard deviations of a row (geometric means): 0.044 to 2."""
SMALLEST_STEP = 2.0**-20
MANTISSA = 8
"""Steps of a rule have this many values between powers of two."""
EVEN = 0.1
"""Share of the mean in a row's sensitivity: it is known from few tokens."""
LEAST_BITS, MOST_BITS = 4, 8
HEADROOM = 1.1
"""Codes of GPTQ are larger than rounded ones by up to about this; beyond, they are clipped."""
ENOUGH = 0.9993
"""Share of the cap from which on no better fit is looked for."""
ROUNDS, SETTLING = 6, 4
FALLBACK = (0.995, 0.98, 0.9, 0.0)
"""Shares of the cap that are aimed at when the rounds ended above it."""


@dataclass(frozen=True)
class Solved:
    """An option made for real."""

    tensor: QuantizedTensor
    num_bytes: float
    increase: float


@dataclass
class Matrix:
    """One matrix and its options, which are numbered rule by rule, width by width."""

    name: str
    tensor: Tensor
    config: QuantizeConfig
    hessian_CC: Tensor | None
    rows_2R: Tensor
    """Sensitivities of either half; the first shapes steps, the second judges them."""
    factor: Factor | None = None
    estimated: Curve = field(default_factory=lambda: Curve(np.zeros(0), np.zeros(0)))
    solved: dict[int, Solved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.hessian_CC is not None:
            self.factor = factorise(self.hessian_CC, self.config)
        options = range(len(RULES) * len(WIDTHS))
        points = np.array([self._estimate(option) for option in options])
        self.estimated = Curve(points[:, 0], points[:, 1])

    @property
    def curve(self) -> Curve:
        """Bytes and increase of each option: as measured, or as estimated and corrected by the
        nearest of those that are."""
        num_bytes, increases = self.estimated.num_bytes.copy(), self.estimated.increases.copy()
        for option in range(len(num_bytes)) if self.solved else ():
            near = min(self.solved, key=lambda other: _distance(option, other))
            made = self.solved[near]
            num_bytes[option] *= made.num_bytes / max(self.estimated.num_bytes[near], 1e-9)
            increases[option] *= made.increase / max(self.estimated.increases[near], 1e-30)
        return Curve(num_bytes, increases)

    def solve(self, option: int, coded_size: CodedSize) -> None:
        """Make the option for real, once."""
        if option in self.solved:
            return
        weights_RC, grid = as_rows(self.tensor), self._grid(option)
        codes_RC = grid.codes(weights_RC, 127)
        bits = _bits(HEADROOM * float(codes_RC.abs().max()))
        scheme = f"int{bits}+u8" if self.config.scale_bits == 8 else f"int{bits}"
        store = scheme_named(scheme)
        assert isinstance(store, PerRow)
        if self.factor is not None and self.hessian_CC is not None:
            codes_RC = best_codes(weights_RC, grid, store.levels, self.hessian_CC, self.factor)
        arrays = store.arrays(codes_RC, grid, tuple(self.tensor.shape))
        made = QuantizedTensor(scheme, tuple(self.tensor.shape), arrays)
        size = coded_size(arrays["codes"].tobytes()) + _scale_bytes(grid)
        self.solved[option] = Solved(made, size, self._increase(weights_RC, grid.decoded(codes_RC)))

    def price(self, option: int) -> float:
        """By how much a byte more lowers the increase at an option: errors fall fourfold a bit."""
        return 16 * math.log(2) * self.solved[option].increase / self.tensor.numel()

    def add_factors(self, option: int, price: float, coded_size: CodedSize) -> bool:
        """Put low-rank factors on a solved option if their bytes pay more than this each."""
        made = self.solved[option]
        better = corrected(made.tensor, self.tensor, self.config, self.hessian_CC)
        if better is None:
            return False
        decoded = torch.from_numpy(scheme_named(better.scheme).decode(better.arrays, better.shape))
        lowered = self._increase(as_rows(self.tensor), as_rows(decoded.to(self.tensor.device)))
        added = [better.arrays[part] for part in better.arrays if part not in made.tensor.arrays]
        num_bytes = sum(coded_size(array.tobytes()) for array in added)
        if made.increase - lowered <= price * num_bytes:
            return False
        self.solved[option] = Solved(better, made.num_bytes + num_bytes, lowered)
        return True

    def _increase(self, weights_RC: Tensor, decoded_RC: Tensor) -> float:
        return increase(self.rows_2R[1], weights_RC, decoded_RC, self.hessian_CC)

    def _estimate(self, option: int) -> tuple[float, float]:
        """Bytes and increase by plain rounding."""
        weights_RC, grid = as_rows(self.tensor), self._grid(option)
        codes_RC = grid.codes(weights_RC, 127)
        counts = torch.bincount(codes_RC.flatten().int() + 127, minlength=255).double()
        shares = counts[counts > 0] / codes_RC.numel()
        bits = float(-(shares * shares.log2()).sum()) * codes_RC.numel()
        square_R = (weights_RC - grid.decoded(codes_RC)).square().mean(1).double()
        columns = self.factor.expected_error() if self.factor else weights_RC.size(1)
        error = 0.5 * columns * float((square_R * self.rows_2R[1]).sum())
        return bits / 8 + _scale_bytes(grid), error

    def _grid(self, option: int) -> Grid:
        rule, width = RULES[option // len(WIDTHS)], WIDTHS[option % len(WIDTHS)]
        shape_R = self._row_shape(rule)
        scales_R = _coarse(shape_R * width).clamp(SMALLEST_STEP, LARGEST_SCALE)
        grid = Grid(torch.full_like(scales_R, torch.inf), scales_R.half())
        if self.config.scale_bits == 8:
            grid = compact(grid)
            assert grid.step is not None
            multiples_R = _coarse(grid.scales_R / grid.step.float()).round().clamp(1, 255)
            grid = replace(grid, scales_R=multiples_R * grid.step.float())
        return grid

    def _row_shape(self, rule: str) -> Tensor:
        """Relative steps of the rows, [R], with the geometric mean of their standard deviations."""
        weights_RC = as_rows(self.tensor)
        spread_R = weights_RC.square().mean(1).sqrt()
        spread_R = spread_R.clamp(min=1e-3 * max(float(spread_R.mean()), SMALLEST_STEP))
        mean = spread_R.log().mean().exp()
        if rule == "spread":
            return spread_R
        factors_R = self.rows_2R[0].float()
        factors_R = (1 - EVEN) * factors_R + EVEN * factors_R.mean().clamp(min=1e-30)
        loss_R = factors_R.rsqrt()
        loss_R = (loss_R / loss_R.log().mean().exp()).clamp(1 / 8, 8.0) * mean
        return loss_R if rule == "loss" else (loss_R * spread_R).sqrt()


class Packer:
    """A trained model, its matrices' options, and the search for a file that fits."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: QuantizeConfig,
        hessians: Mapping[str, Tensor],
        sensitivities: Sensitivities,
        coded_size: CodedSize,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            coded_size: bytes that codes take in the file, nearly.
        """
        kept, self._aliases = untied(state)
        self._order = list(kept)
        names = [name for name in coded_names(kept, config) if name in sensitivities.rows]
        others = {name: tensor for name, tensor in kept.items() if name not in names}
        self._others = quantize(others, config.model_copy(update={"low_rank": "off"})).tensors
        self._matrices = [
            Matrix(
                name,
                kept[name],
                config,
                hessians.get(name),
                sensitivities.rows[name] * sensitivities.factors[name],
            )
            for name in names
        ]
        self._coded_size = coded_size
        self._log = log
        self._chosen = [0] * len(names)
        self._config = config
        self._factored: list[str] | None = None

    def pack(self, cap: int, encode: Encode) -> bytes:
        """The file of least expected loss that has at most `cap` bytes.

        Raises: ArtifactError when even the coarsest codes take more.
        """
        beside: float = len(encode(QuantizedState(self._others)))
        best: bytes | None = None
        chosen, least = self._chosen, math.inf
        for share in (*([1.0] * ROUNDS), *FALLBACK):
            if best is not None and (share < 1 or len(best) >= ENOUGH * cap or self._is_finest):
                break
            self._settle(share * cap - beside)
            if self._factored is None:
                self._factored = self._add_factors()
            blob = encode(self.state)
            beside = len(blob) - self._num_bytes
            if len(blob) <= cap and self.increase < least:
                best, chosen, least = blob, self._chosen, self.increase
        if best is None:
            raise ArtifactError(
                f"quantize.allocate: with the coarsest steps the model packs into {len(blob):,} "
                f"bytes, {len(blob) - cap:,} more than the {cap:,} that budget.artifact_bytes "
                "leaves beside the code; make the model smaller"
            )
        self._chosen = chosen
        self._report(best, cap)
        return best

    @property
    def state(self) -> QuantizedState:
        """The model as chosen."""
        made = {
            matrix.name: matrix.solved[option].tensor
            for matrix, option in zip(self._matrices, self._chosen, strict=True)
        }
        tensors = {name: made.get(name) or self._others[name] for name in self._order}
        return QuantizedState(tensors, self._aliases)

    @property
    def increase(self) -> float:
        """The proxy of what is chosen, nats per token."""
        return sum(made.increase for made in self._made)

    @property
    def _made(self) -> list[Solved]:
        pairs = zip(self._matrices, self._chosen, strict=True)
        return [matrix.solved[option] for matrix, option in pairs]

    @property
    def _num_bytes(self) -> float:
        return sum(made.num_bytes for made in self._made)

    @property
    def _is_finest(self) -> bool:
        """More bytes would not help any more."""
        return all(
            matrix.curve.increases[option] <= matrix.curve.increases.min()
            for matrix, option in zip(self._matrices, self._chosen, strict=True)
        )

    def _settle(self, cap: float) -> None:
        """Choose, make what is chosen, and choose again by what that took."""
        for _ in range(SETTLING):
            curves = [matrix.curve for matrix in self._matrices]
            self._chosen = allocate(curves, cap)
            pairs = list(zip(self._matrices, self._chosen, strict=True))
            if all(option in matrix.solved for matrix, option in pairs):
                return
            for matrix, option in pairs:
                matrix.solve(option, self._coded_size)

    def _add_factors(self) -> list[str]:
        """Low-rank factors for the worst of the matrices that quantize.low_rank means, where a byte
        of them lowers the loss by more than a byte of codes. Returns whose."""
        pairs = list(zip(self._matrices, self._chosen, strict=True))
        able = [pair for pair in pairs if takes_low_rank(self._config, pair[0].name)]
        able.sort(key=lambda pair: -pair[0].solved[pair[1]].increase)
        price = float(np.median([matrix.price(option) for matrix, option in pairs]))
        return [
            matrix.name
            for matrix, option in able[: self._config.low_rank_top_k or None]
            if matrix.add_factors(option, price, self._coded_size)
        ]

    def _report(self, blob: bytes, cap: int) -> None:
        if self._factored:
            self._log(f"allocate: low-rank factors pay for {', '.join(self._factored)}")
        widths = [WIDTHS[option % len(WIDTHS)] for option in self._chosen]
        mean = math.exp(sum(map(math.log, widths)) / max(len(widths), 1))
        self._log(
            f"allocate: {len(blob):,} of {cap:,} bytes of model, steps of {min(widths):.3f} to "
            f"{max(widths):.3f} deviations, mean {mean:.3f}; expected increase of the loss "
            f"{self.increase:.5f} nats"
        )


def _bits(largest: float) -> int:
    """The least width that holds codes of this size, of those there are."""
    return min(max(LEAST_BITS, math.ceil(math.log2(largest + 1) + 1)), MOST_BITS)


def _coarse(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2 * MANTISSA).round() / (2 * MANTISSA), exponent)


def _distance(option: int, other: int) -> int:
    """Steps of the ladder between two options; another rule counts as one more."""
    number = len(WIDTHS)
    return 2 * abs(option % number - other % number) + (option // number != other // number)


def _scale_bytes(grid: Grid) -> float:
    """What the rows' steps take when packed: their entropy, nearly."""
    scales_R = grid.scales_R.cpu().numpy()
    _, counts = np.unique(scales_R, return_counts=True)
    shares = counts / len(scales_R)
    return float(-(shares * np.log2(shares)).sum()) * len(scales_R) / 8
