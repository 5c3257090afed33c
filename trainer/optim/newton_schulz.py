"""Approximate orthogonalisation of a stack of equal-shaped matrices.

A quintic Newton-Schulz iteration drives every singular value towards 1 while it keeps the singular
vectors. The coefficients trade exactness for speed: five steps from singular values in [0.01, 1]
end in about [0.7, 1.2]. Jordan et al., Muon, https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
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
    tall = stack_NRC.size(1) > stack_NRC.size(2)
    # The products are of the side of the rows: work on the wide form.
    wide = stack_NRC.mT if tall else stack_NRC
    norm: Tensor = torch.linalg.matrix_norm(wide, keepdim=True)
    x: Tensor = (wide / (norm + NORM_EPS)).to(dtype).contiguous()
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
