"""AWQ-lite: the groups of neighbouring columns that matter most keep 8 bits (parameter-golf #1908).

A group's score is the sum over its columns of the inputs' root mean square times the mean |w|; the
best groups of the whole model are chosen.

Legend: R rows, C columns, N groups of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.quantize.per_row import as_rows


def choose_groups(
    weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], num_groups: int, columns: int
) -> dict[str, tuple[int, ...]]:
    """First columns of the chosen groups, rising, by matrix.

    Args:
        weights: the matrices that may have such groups; those without a Hessian are passed over.
        columns: of a group, aligned to multiples of it; what is left at the end of a row is none.
    """
    scored: list[tuple[float, str, int]] = []
    for name, tensor in weights.items():
        if name in hessians:
            scores_N = group_scores(as_rows(tensor), hessians[name].diagonal(), columns)
            scored += [(score, name, place) for place, score in enumerate(scores_N.tolist())]
    scored.sort(key=lambda entry: -entry[0])
    chosen: dict[str, tuple[int, ...]] = {}
    for _, name, place in scored[:num_groups]:
        chosen[name] = tuple(sorted((*chosen.get(name, ()), place * columns)))
    return chosen


def group_scores(weights_RC: Tensor, moments_C: Tensor, columns: int) -> Tensor:
    """The score of every whole group, [N], fp64."""
    root_C = moments_C.double().clamp(min=0).sqrt()
    score_C = root_C * weights_RC.abs().mean(0, dtype=torch.float64)
    num_groups = len(score_C) // columns
    return score_C[: num_groups * columns].view(num_groups, columns).sum(1)
