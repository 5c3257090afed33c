"""Approximate orthogonalisation of a stack of equal-shaped matrices.

A quintic Newton-Schulz iteration drives every singular value towards 1 while it keeps the singular
vectors. The coefficients trade exactness for speed: five steps from singular values in [0.01, 1]
end in about [0.7, 1.2]. Jordan et al., Muon, https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]
"""a, b, c of a s + b s^3 + c s^5."""
COEFFICIENTS: Polynomial = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7
"""Added to the Frobenius norm, so that a zero matrix stays zero."""


def orthogonalize(stack_NRC: Tensor, num_steps: int, dtype: torch.dtype) -> Tensor:
    """U V^T of each matrix's singular value decomposition, roughly; [N, R, C] in `dtype`.

    Args:
        stack_NRC: N matrices of R rows and C columns.
        num_steps: iterations.
        dtype: what the matrix products run in; bfloat16 is enough, since the error of the
            iteration itself is larger.
    """
    return quintic(stack_NRC, num_steps * (COEFFICIENTS,), dtype)


def quintic(stack_NRC: Tensor, polynomials: Sequence[Polynomial], dtype: torch.dtype) -> Tensor:
    """Each matrix over its Frobenius norm, then one polynomial after another: every singular value
    s becomes a s + b s^3 + c s^5; [N, R, C] in `dtype`."""
    # The products are of the side of the rows: work on the wide form.
    x = normalized(wide(stack_NRC), dtype)
    for polynomial in polynomials:
        x = applied(x, x @ x.mT, polynomial)
    return like(x, stack_NRC)


def wide(stack_NRC: Tensor) -> Tensor:
    """The matrices, transposed where they are tall."""
    return stack_NRC.mT if stack_NRC.size(1) > stack_NRC.size(2) else stack_NRC


def like(x: Tensor, stack_NRC: Tensor) -> Tensor:
    """Inverse of `wide`, by the shape that went in."""
    return x.mT if stack_NRC.size(1) > stack_NRC.size(2) else x


def normalized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each matrix over its Frobenius norm, so that no singular value is above 1."""
    norm: Tensor = torch.linalg.matrix_norm(x, keepdim=True)
    return (x / (norm + NORM_EPS)).to(dtype).contiguous()


def applied(x: Tensor, gram: Tensor, polynomial: Polynomial) -> Tensor:
    """a X + (b G + c G^2) X with G = X X^T."""
    a, b, c = polynomial
    return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
