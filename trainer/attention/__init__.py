"""Attention backends behind one signature, in one visible table, chosen when the model is built.

A new backend is one file with a `Backend` and a line in the table; the conformance tests run over
the table, so it is tested without writing a test.
"""

from functools import partial
from typing import Any

from torch import Tensor

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.cudnn import CUDNN
from trainer.attention.documents import Documents
from trainer.attention.flash4 import FLASH4
from trainer.attention.flex import FLEX
from trainer.attention.measured import build_fastest
from trainer.attention.sdpa import SDPA
from trainer.attention.varlen import VARLEN
from trainer.errors import BackendError

__all__ = ["ATTENTION", "Attend", "Backend", "Documents", "attend_by_window", "select_backend"]

ATTENTION: dict[str, Backend] = {
    "sdpa": SDPA,
    "flex": FLEX,
    "flash4": FLASH4,
    "cudnn": CUDNN,
    "varlen": VARLEN,
}

AUTO = ("sdpa", "flex")
"""What "auto" tries in turn."""
AUTO_FOR_DOCUMENTS = {"cuda": ("flex",)}
"""What it tries before that where documents are apart, by device type."""
AUTO_FOR_WINDOWS = {"cuda": ("flex",)}
"""What it tries before that for layers with a window, by device type, because it skips what is
outside. A backend enters these where it was measured to win (benchmarks/windows.py)."""


def select_backend(
    name: str,
    device_type: str,
    log: Log,
    windowed: bool = False,
    documents: bool = False,
    half: bool = True,
) -> Attend:
    """The attention function for "auto", "fastest" or a name of the table.

    Args:
        device_type: "cpu" or "cuda".
        log: told what "auto" took and what it passed over.
        windowed: some layers will ask for a window. On cuda "auto" then serves them with flex,
            which skips what is outside, where sdpa computes everything under a mask.
        documents: it will be called with documents. On cuda "auto" then takes flex throughout, for
            the same reason.
        half: it will compute in bfloat16; asked by "fastest" only.
    Raises:
        BackendError: the named backend is unknown or cannot run here; says what to do.
    """
    if name == "auto":
        apart = AUTO_FOR_DOCUMENTS.get(device_type, ()) if documents else ()
        full = _first_that_runs((*apart, *AUTO), device_type, log)
        return _with_fast_windows(full, device_type, log) if windowed else full
    if name == "fastest":
        return build_fastest(ATTENTION, device_type, log, windowed, documents, half)
    if name not in ATTENTION:
        known = ", ".join(("auto", *ATTENTION, "fastest"))
        raise BackendError(f"runtime.attention = {name!r}: no such backend; choose one of {known}")
    fault = ATTENTION[name].fault(device_type)
    if fault is not None:
        raise BackendError(f"runtime.attention = {name!r}: {fault}")
    return ATTENTION[name].build(device_type, log)


def _first_that_runs(names: tuple[str, ...], device_type: str, log: Log) -> Attend:
    for backend in (ATTENTION[name] for name in names):
        fault = backend.fault(device_type)
        if fault is None:
            log(f"attention: auto takes {backend.name} on {device_type}")
            return backend.build(device_type, log)
        log(f"attention: auto passes over {backend.name}: {fault}")
    raise BackendError(f"runtime.attention = 'auto': no backend runs on {device_type}")


def _with_fast_windows(full: Attend, device_type: str, log: Log) -> Attend:
    for backend in (ATTENTION[name] for name in AUTO_FOR_WINDOWS.get(device_type, ())):
        fault = backend.fault(device_type)
        if fault is None:
            log(f"attention: auto takes {backend.name} for layers with a window")
            return partial(attend_by_window, full, backend.build(device_type, log))
        log(f"attention: auto cannot take {backend.name}, which skips what is outside: {fault}")
    return full


def attend_by_window(
    full: Attend,
    windowed: Attend,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    /,
    *,
    window: int | None = None,
    **options: Any,
) -> Tensor:
    """One backend for full attention, another for windows. A layer's window is fixed, so a compiled
    model holds no branch."""
    attend = full if window is None else windowed
    return attend(q_BTHD, k_BTGD, v_BTGD, window=window, **options)
