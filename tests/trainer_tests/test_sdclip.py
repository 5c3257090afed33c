"""SDClip against a loop over rows in Python's own arithmetic."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from trainer.quantize.sdclip import sd_clip_round, sd_clip_scale


def rows(seed: int = 0) -> Tensor:
    """Rows of very different spreads, with outliers and an offset."""
    weights = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(seed))
    weights *= torch.tensor([1e-3, 0.02, 0.3, 1.0, 7.0])[:, None]
    weights[0, 3, 7] = 30.0
    weights[1, 2] += 0.4
    return weights


@pytest.mark.parametrize(("bits", "sigmas"), [(6, 12.85), (8, 20.0), (4, 3.0), (7, 1.5)])
def test_scales_and_codes_are_those_of_a_loop(bits: int, sigmas: float) -> None:
    weights = rows()
    scales, rounded = sd_clip_scale(weights, bits, sigmas), sd_clip_round(weights, bits, sigmas)
    levels = 2 ** (bits - 1) - 1
    for i in range(3):
        for j in range(5):
            row = weights[i, j].tolist()
            want = sigmas * statistics.stdev(row) / levels
            assert scales[i, j].item() == pytest.approx(want, rel=1e-5)
            stored = scales[i, j].half().item()
            codes = [max(-levels, min(levels, round(w / stored))) for w in row]
            torch.testing.assert_close(
                rounded[i, j], torch.tensor([stored * code for code in codes]), rtol=1e-6, atol=0
            )


def test_the_grid_follows_the_weights_scale() -> None:
    weights = rows(1)
    torch.testing.assert_close(
        sd_clip_scale(9 * weights, 6, 12.85), 9 * sd_clip_scale(weights, 6, 12.85)
    )


def test_rows_without_spread_do_not_divide_by_zero() -> None:
    flat = torch.tensor([[0.0, 0.0, 0.0], [1e-30, -1e-30, 0.0]])
    assert (sd_clip_scale(flat, 6, 12.85) == 1e-10).all()
    assert not sd_clip_round(flat, 6, 12.85).any()
    single = torch.tensor([[0.5], [-3.0]])
    torch.testing.assert_close(sd_clip_round(single, 8, 20.0), single, rtol=1e-3, atol=0)
