"""Grouped queries for backends without them: every key and value head repeated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.attention.base import Attend


def repeat_groups(
    attend: Attend,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    /,
    **options: Any,
) -> Tensor:
    """As `attend`, which then sees as many key and value heads as query heads.

    Head g stands H / G times in a row (not the whole list H / G times over), because query head h
    reads group h // (H / G).
    """
    repeats = q_BTHD.size(2) // k_BTGD.size(2)
    k_BTHD, v_BTHD = (x.repeat_interleave(repeats, dim=2) for x in (k_BTGD, v_BTGD))
    return attend(q_BTHD, k_BTHD, v_BTHD, **options)
