"""Second moments of neurons: what keeps some outputs of a matrix from moving more than others.

After NorMuon (https://arxiv.org/abs/2510.05491) as slowrun runs it: after the orthogonalisation,
with one value per row of a matrix that is not wider than tall, else one per column,

    V <- beta V + (1 - beta) mean(X^2);  X <- X / sqrt(V), scaled back to the norm that X had

from V = 0 without bias correction, which the scaling undoes.

Legend: N matrices of R rows and C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-10
"""V counts as at least this."""


def new_moments(shape_NRC: torch.Size, beta: float, device: torch.device) -> Tensor:
    """Where V begins: zeros, [N, R, 1] or [N, 1, C]; empty for beta = 0, which is off."""
    num, rows, columns = shape_NRC
    if not beta:
        return torch.zeros(num, 0, device=device)
    return torch.zeros((num, rows, 1) if rows >= columns else (num, 1, columns), device=device)


def equalize(update_NRC: Tensor, moments: Tensor, beta: float) -> Tensor:
    """Updates in which all neurons have moved alike, fp32; takes their squares into `moments`."""
    update_NRC = update_NRC.float()
    axis = 2 if moments.size(2) == 1 else 1
    moments.lerp_(update_NRC.square().mean(axis, keepdim=True), 1 - beta)
    norm: Tensor = torch.linalg.matrix_norm(update_NRC, keepdim=True)
    scaled_NRC = update_NRC * moments.clamp(min=FLOOR).rsqrt()
    equal_NRC: Tensor = scaled_NRC * (
        norm / torch.linalg.matrix_norm(scaled_NRC, keepdim=True).clamp(min=FLOOR)
    )
    return equal_NRC
