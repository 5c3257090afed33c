"""The orthogonalisation against what it does to singular values, worked out separately."""

import pytest
import torch
from torch import Tensor

from trainer.optim.newton_schulz import COEFFICIENTS, orthogonalize


def with_singular_values(values: Tensor, rows: int, columns: int, seed: int) -> tuple[Tensor, ...]:
    """U, V and U diag(values) V^T, fp64."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, len(values), generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(columns, len(values), generator=generator).double()).Q
    return u, v, u * values @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 14), (20, 5)])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_keeps_singular_vectors_and_maps_singular_values(
    rows: int, columns: int, num_steps: int
) -> None:
    values = torch.linspace(0.05, 3.0, min(rows, columns)).double()
    u, v, matrix = with_singular_values(values, rows, columns, seed=rows)
    other = torch.randn(rows, columns, generator=torch.Generator().manual_seed(9)).double()
    mapped = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    stack = torch.stack((other, matrix))
    exact = u * mapped @ v.T
    got = orthogonalize(stack, num_steps, torch.float64)[1]
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    got = orthogonalize(stack.float(), num_steps, torch.float32)[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_steps_bring_singular_values_near_one(dtype: torch.dtype) -> None:
    matrices = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(1))
    before = torch.linalg.svdvals(matrices)
    assert (before.amax(1) / before.amin(1) > 4).all()
    after = torch.linalg.svdvals(orthogonalize(matrices, 5, dtype).float())
    assert float(after.min()) > 0.6 and float(after.max()) < 1.3


def test_scale_of_the_input_does_not_matter() -> None:
    matrix = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    small, large = (orthogonalize(matrix * s, 5, torch.float32) for s in (1e-3, 1e3))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)


def test_zero_gradient_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6), 5, torch.float32).any()
