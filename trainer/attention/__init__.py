"""Attention backends behind one signature, in one visible table, chosen when the model is built.

A new backend is one file with a `Backend` and a line in the table; the conformance tests run over
the table, so it is tested without writing a test.
"""

from functools import partial

from torch import Tensor

from trainer.attention.base import Attend, Backend, Log
from trainer.attention.flex import FLEX
from trainer.attention.sdpa import SDPA
from trainer.errors import BackendError

__all__ = ["ATTENTION", "Attend", "Backend", "attend_by_window", "select_backend"]

ATTENTION: dict[str, Backend] = {backend.name: backend for backend in (SDPA, FLEX)}
"""In the order in which "auto" tries them."""


def select_backend(name: str, device_type: str, log: Log, windowed: bool = False) -> Attend:
    """The attention function for "auto" or a name of the table.

    Args:
        device_type: "cpu" or "cuda".
        log: told what "auto" took and what it passed over.
        windowed: some layers will ask for a window. On cuda "auto" then serves them with flex,
            which skips what is outside, where sdpa computes everything under a mask.
    Raises:
        BackendError: the named backend is unknown or cannot run here; says what to do.
    """
    if name == "auto":
        full = _first_that_runs(device_type, log)
        return _with_fast_windows(full, device_type, log) if windowed else full
    if name not in ATTENTION:
        known = ", ".join(("auto", *ATTENTION))
        raise BackendError(f"runtime.attention = {name!r}: no such backend; choose one of {known}")
    fault = ATTENTION[name].fault(device_type)
    if fault is not None:
        raise BackendError(f"runtime.attention = {name!r}: {fault}")
    return ATTENTION[name].build(device_type, log)


def _first_that_runs(device_type: str, log: Log) -> Attend:
    for backend in ATTENTION.values():
        fault = backend.fault(device_type)
        if fault is None:
            log(f"attention: auto takes {backend.name} on {device_type}")
            return backend.build(device_type, log)
        log(f"attention: auto passes over {backend.name}: {fault}")
    raise BackendError(f"runtime.attention = 'auto': no backend runs on {device_type}")


def _with_fast_windows(full: Attend, device_type: str, log: Log) -> Attend:
    if device_type != "cuda":
        return full
    fault = FLEX.fault(device_type)
    if fault is not None:
        log(f"attention: auto cannot take flex for windows, so they save no time: {fault}")
        return full
    log("attention: auto takes flex for layers with a window")
    return partial(attend_by_window, full, FLEX.build(device_type, log))


def attend_by_window(
    full: Attend,
    windowed: Attend,
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    /,
    *,
    window: int | None = None,
) -> Tensor:
    """One backend for full attention, another for windows. A layer's window is fixed, so a compiled
    model holds no branch."""
    attend = full if window is None else windowed
    return attend(q_BTHD, k_BTGD, v_BTGD, window=window)
