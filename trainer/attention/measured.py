"""`runtime.attention = fastest`: for every kind of attention and row length the backend that was
measured to be the fastest of those that run here.

Milliseconds forward and backward on one H200, PyTorch 2.11, bf16, 8 query heads on 4, width 64,
73,728 tokens in rows of 2048 and 61,440 in rows of 6144, medians of 20; windows of 512. Choosing
looks at shapes only, which a compiled graph has fixed, so it leaves no branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.documents import Documents
from trainer.errors import BackendError


class Row(NamedTuple):
    """A line of the table."""

    kind: str
    """ "full", "window" or "documents"."""
    num_tokens: int
    """Of a row, at which it was measured."""
    milliseconds: Mapping[str, float]
    """By backend; what was not measured comes last, in the order in which it is written."""


NOT_MEASURED = math.inf

TABLE = (
    Row("full", 2048, {"flash4": 1.685, "cudnn": 1.713, "flex": 2.309, "sdpa": 2.821}),
    Row("full", 6144, {"flash4": 2.932, "cudnn": 3.375, "flex": 4.721, "sdpa": 5.494}),
    Row("window", 2048, {"flash4": 1.408, "flex": 1.740, "sdpa": NOT_MEASURED}),
    Row("window", 6144, {"flash4": 1.213, "flex": 1.515, "sdpa": NOT_MEASURED}),
    Row("documents", 2048, dict.fromkeys(("flex", "flash4", "sdpa"), NOT_MEASURED)),
)


def build_fastest(
    backends: Mapping[str, Backend],
    device_type: str,
    log: Log,
    windowed: bool,
    documents: bool,
    half: bool = True,
) -> Attend:
    """Chooses once, and says what it took and what it passed over.

    Args:
        windowed: whether some layers will ask for a window.
        documents: whether documents will be apart.
        half: whether it will compute in bfloat16, which FlashAttention needs.
    Raises: BackendError when nothing of the table runs here.
    """
    faults = {name: backend.fault(device_type) for name, backend in backends.items()}
    if not half:
        faults["flash4"] = "it does not compute in float32"
    built: dict[str, Attend] = {}
    chosen: dict[str, list[tuple[int, Attend]]] = {}
    wanted = {"full": not documents, "window": windowed and not documents, "documents": documents}
    for row in TABLE if device_type == "cuda" else (Row("full", 0, {"sdpa": 0.0}),):
        if device_type == "cuda" and not wanted[row.kind]:
            continue
        name = fastest_of(row, faults)
        if name not in built:
            built[name] = backends[name].build(device_type, log)
        chosen.setdefault(row.kind, []).append((row.num_tokens, built[name]))
        log(f"attention: fastest takes {name} for {row.kind} rows of about {row.num_tokens}")
    for name in sorted(set(TABLE[0].milliseconds) - set(built)):
        if faults.get(name):
            log(f"attention: fastest passes over {name}: {faults[name]}")
    return partial(_attend, chosen)


def fastest_of(row: Row, faults: Mapping[str, str | None]) -> str:
    """The first of a line that runs. Raises BackendError when none does."""
    for name in sorted(row.milliseconds, key=row.milliseconds.__getitem__):
        if name in faults and faults[name] is None:
            return name
    raise BackendError(f"runtime.attention = 'fastest': no backend runs {row.kind} attention here")


def nearest(rows: list[tuple[int, Attend]], num_tokens: int) -> Attend:
    """What was chosen at the measured length that is nearest by ratio."""
    return min(rows, key=lambda row: max(row[0], num_tokens) / max(1, min(row[0], num_tokens)))[1]


def _attend(
    chosen: Mapping[str, list[tuple[int, Attend]]],
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    /,
    *,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """See `Attend`."""
    kind = "full" if window is None else "window"
    kind = kind if documents is None else "documents"
    rows = chosen[kind] if kind in chosen else next(iter(chosen.values()))
    attend = rows[0][1] if len(rows) == 1 else nearest(rows, int(q_BTHD.size(1)))
    return attend(q_BTHD, k_BTGD, v_BTGD, window=window, documents=documents)
