"""The ways to store a tensor, by name: a table, and what a name may add to one of its entries.

    int6            codes, one fp16 scale a row
    int6+u8         scales as multiples of one step
    int6+hi2x64     two groups of 64 columns at 8 bits
    int6+lr1        fp16 factors of rank 1
    int6+lr4g64     factors of rank 4 in 2 and 4 bits, a scale for each 64 numbers

in this order. A name says everything about a tensor's layout but its shape.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace

from trainer.quantize.kept import Flat, Kept
from trainer.quantize.low_rank import LowRank
from trainer.quantize.per_row import PerRow
from trainer.quantize.state import Scheme

SCHEMES: dict[str, Scheme] = {
    "int8": PerRow(levels=127),
    "int7": PerRow(levels=63),
    "int6": PerRow(levels=31),
    "int5": PerRow(levels=15),
    "int4": PerRow(levels=7),
    "float16": Kept("<f2", "float32"),
    "float32": Kept("<f4", "float32"),
    "int64": Kept("<i8", "int64"),
    "flat8": Flat(),
}

_NUMBER = r"([1-9]\d{0,3})"
_EXTENDED = re.compile(
    rf"(int[4-8])(\+u8)?(?:\+hi{_NUMBER}x{_NUMBER})?(?:\+lr{_NUMBER}(?:g{_NUMBER})?)?", re.ASCII
)


@functools.lru_cache(4096)
def find_scheme(name: str) -> Scheme | None:
    """The scheme of this name; None when there is none."""
    if name in SCHEMES:
        return SCHEMES[name]
    found = _EXTENDED.fullmatch(name)
    if found is None:
        return None
    base, has_step, num_high, high_columns, rank, group = found.groups()
    per_row = SCHEMES[base]
    assert isinstance(per_row, PerRow)
    extended = replace(
        per_row,
        has_step=bool(has_step),
        num_high=int(num_high or 0),
        high_columns=int(high_columns or 0),
    )
    return extended if rank is None else LowRank(extended, int(rank), int(group or 0))


def scheme_named(name: str) -> Scheme:
    """The scheme of a name that this code made itself."""
    scheme = find_scheme(name)
    assert scheme is not None, name
    return scheme
