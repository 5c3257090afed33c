"""Keeps the host one step ahead of the device, and knows when steps are really done.

Launching is asynchronous on cuda: a host that never waits would run far ahead and stop late; one
that waits after every step starves the device. The pacer lets one step be in flight while the next
is launched, and reads losses through pinned buffers, so that no read waits for later work.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Steps that may be on the device, launched and unfinished, when the next launch is decided."""


class StepPacer:
    """Tracks launched steps on one device. On the CPU every step is done when it is launched."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()

    @property
    def in_flight(self) -> int:
        """Steps launched whose end was not yet seen."""
        return len(self._pending)

    def launched(self, loss: Tensor) -> None:
        """Note a launched step by its scalar loss tensor on the device."""
        if not self._cuda:
            self._pending.append((None, loss.detach().clone()))
            return
        box = torch.empty((), dtype=loss.dtype, pin_memory=True)
        box.copy_(loss, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending.append((event, box))

    def wait(self) -> list[float]:
        """Wait until fewer than IN_FLIGHT steps are pending; losses of the steps seen done."""
        return self._finish(IN_FLIGHT - 1 if self._cuda else 0)

    def drain(self) -> list[float]:
        """Wait for all steps; their losses, oldest first."""
        return self._finish(0)

    def _finish(self, keep: int) -> list[float]:
        losses = []
        while len(self._pending) > keep:
            event, box = self._pending.popleft()
            if event is not None:
                event.synchronize()
            losses.append(float(box))
        return losses
