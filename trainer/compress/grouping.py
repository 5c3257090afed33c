"""Which byte stream an array of an artifact goes to, and how a matrix of codes lies in it.

An entropy coder does better on one statistic at a time: codes of one role (parameter-golf #1586,
#1855) lie together, columns one after another, rows in an order in which each is near the one
before it. The published form codes the groups with lrzip, a program that must be there to read the
artifact; here it is compress.codec.

Legend: R rows, C columns.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from trainer.errors import ArtifactError

Grouping = Literal["type", "role", "role_transposed", "role_sorted"]
ORDERS = "<u2.orders"
"""The stream of the rows' orders."""
MAX_SORTED_ROWS = 1 << 16

_ROLES = {"q": "qo", "out": "qo", "k": "kv", "v": "kv", "up": "up", "down": "down"}


class Place(NamedTuple):
    """Where an array lies."""

    stream: str
    """Element type, and the role of a matrix of codes; the part before the dot is numpy's."""
    is_transposed: bool = False
    is_sorted: bool = False


def place(grouping: Grouping, name: str, part: str, dtype: str, shape: tuple[int, ...]) -> Place:
    """The place of one array, by what is known before a byte of content is read.

    Args:
        name: of the tensor; `part` that of its array.
    """
    if grouping == "type" or part != "codes" or len(shape) != 2 or min(shape) < 2:
        return Place(dtype)
    pieces = name.split(".")
    is_embedding = "tok_emb" in pieces
    role = "embed" if is_embedding else _ROLES.get(pieces[-2] if len(pieces) > 1 else "", "rest")
    is_hot = role in ("embed", "up") or "q" in pieces
    is_sorted = grouping == "role_sorted" and is_hot and shape[0] <= MAX_SORTED_ROWS
    return Place(f"{dtype}.{role}", grouping != "role", is_sorted)


def near_rows_first(codes_RC: np.ndarray) -> np.ndarray:
    """An order of the rows, [R] uint16, in which each is the nearest to its predecessor, by the sum
    of absolute differences, of those that are left. Begins with row 0; the first of equals wins.

    Takes R^2 C steps: half a minute for 8192 x 512.
    """
    left_RC = codes_RC.astype(np.int16)
    rows_R = np.arange(len(left_RC))
    order_R = np.zeros(len(left_RC), "<u2")
    row = 0
    for place_, num_left in enumerate(range(len(left_RC) - 1, -1, -1)):
        order_R[place_] = rows_R[row]
        current_C = left_RC[row].copy()
        # The last one left takes the place of the one taken.
        left_RC[row], rows_R[row] = left_RC[num_left], rows_R[num_left]
        if num_left:
            distances = np.abs(left_RC[:num_left] - current_C).sum(1, dtype=np.int64)
            row = int(distances.argmin())
    return order_R


def arranged(codes_RC: np.ndarray, where: Place, order_R: np.ndarray | None) -> bytes:
    """The bytes of a matrix at its place."""
    if order_R is not None:
        codes_RC = codes_RC[order_R]
    return (codes_RC.T if where.is_transposed else codes_RC).tobytes()


def restored(flat: np.ndarray, shape: tuple[int, ...], where: Place, order: bytes) -> np.ndarray:
    """Inverse of arranged. `order` is empty where rows are not sorted.

    Raises: ArtifactError when the order is none.
    """
    array = flat.reshape(shape)
    if where.is_transposed:
        array = np.ascontiguousarray(flat.reshape(shape[::-1]).T)
    if not where.is_sorted:
        return array
    order_R = np.frombuffer(order, "<u2")
    if not np.array_equal(np.sort(order_R), np.arange(len(array))):
        raise ArtifactError("artifact: an order of rows is none; pack the model again")
    sorted_back = np.empty(shape, array.dtype)
    sorted_back[order_R] = array
    return sorted_back
