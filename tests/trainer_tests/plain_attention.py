"""Attention written out query by query, for tests to compare with."""

import torch
from torch import Tensor


def plain_attention(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, /, *, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention in the inputs' dtype; differentiable, slow."""
    num_rows, num_tokens, num_heads, width = q_BTHD.shape
    heads_per_group = num_heads // k_BTGD.size(2)
    rows = []
    for row in range(num_rows):
        heads = []
        for head in range(num_heads):
            group = head // heads_per_group
            outputs = []
            for token in range(num_tokens):
                first = 0 if window is None else max(0, token - window)
                keys = k_BTGD[row, first : token + 1, group]
                scores = keys @ q_BTHD[row, token, head] / width**0.5
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                outputs.append(weights @ v_BTGD[row, first : token + 1, group])
            heads.append(torch.stack(outputs))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows)
