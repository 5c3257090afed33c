"""The workers of one run: who am I, and the few collectives the trainer needs.

A run may be one process, ranks started by torchrun, or ranks whose process group a Ray Train worker
has set up already. `Group` hides the difference. Small control values (clock, stop decisions) go
over gloo on the CPU, so that they never wait for the device; tensors go over the default backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from trainer import errors
from trainer.errors import BackendError, TrainerError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that answers nothing for this long is taken for dead."""

# PyTorch 2.12 renamed both collectives and warns at the older names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Pending:
    """The outcome of a collective that may still be on its way."""

    _tensor: Tensor
    _source: Tensor
    """Kept alive until the collective is done."""
    _work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The outcome; on cuda the current stream waits for it, the host does not."""
        if self._work is not None:
            # Once only: gloo writes the outcome at every wait, over what was done with it since.
            self._work.wait()
            self._work = None
        return self._tensor


class Group:
    """The ranks of one run. Every method with a collective must be called on all ranks alike."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size
        self._control: dist.ProcessGroup | None = None
        if size > 1 and dist.get_backend() != "gloo":
            self._control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def close(self) -> None:
        """Leave what this group made. The process group of the run stays."""
        if self._control is not None:
            dist.destroy_process_group(self._control)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which reports and writes files."""
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_counts(self, counts: NDArray[np.int8]) -> NDArray[np.int8]:
        """Element-wise sum over ranks of small host numbers, not touching the device."""
        if self.size == 1:
            return counts
        box = torch.from_numpy(counts.copy())
        dist.all_reduce(box, group=self._control)
        return box.numpy()

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Mean over ranks of each tensor, in place; one collective per dtype."""
        if self.size == 1:
            return
        for dtype in {tensor.dtype for tensor in tensors}:
            bucket = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            flat.div_(self.size)
            sizes = [tensor.numel() for tensor in bucket]
            parts = torch.split(flat, sizes)
            torch._foreach_copy_(
                bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
            )

    def reduce_scatter_sum(self, tensor: Tensor) -> Pending:
        """Start to sum over ranks; this rank receives its part, the rank-th of `size` equal pieces
        of the first axis, which `size` must divide."""
        if self.size == 1:
            return Pending(tensor, tensor)
        part = tensor.new_empty(tensor.size(0) // self.size, *tensor.shape[1:])
        return Pending(part, tensor, _reduce_scatter(part, tensor, async_op=True))

    def all_gather(self, part: Tensor) -> Pending:
        """Start to join the equal-shaped parts of all ranks along the first axis."""
        if self.size == 1:
            return Pending(part, part)
        whole = part.new_empty(part.size(0) * self.size, *part.shape[1:])
        return Pending(whole, part, _all_gather(whole, part, async_op=True))

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Copy from rank `src` to all, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src)
        return tensor

    def max_floats(self, *values: float) -> list[float]:
        """Element-wise maximum over ranks of a few host numbers, in fp64, not touching the
        device."""
        if self.size == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._control)
        return [float(value) for value in box]

    def max_float(self, value: float) -> float:
        """Maximum over ranks of one host number."""
        return self.max_floats(value)[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on rank 0 while the others wait; None there. A TrainerError that it raises
        is raised on every rank."""
        outcome, failure = None, ""
        if self.is_main:
            try:
                outcome = work()
            except TrainerError as error:
                failure = f"{type(error).__name__}:{error}"
        failure = self.broadcast_bytes(failure.encode() if self.is_main else None).decode()
        if failure:
            kind, _, message = failure.partition(":")
            raise getattr(errors, kind)(message)
        return outcome

    def broadcast_bytes(self, blob: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None."""
        if self.size == 1:
            assert blob is not None
            return blob
        length = torch.tensor([len(blob) if blob is not None else 0])
        dist.broadcast(length, 0, group=self._control)
        box = torch.empty(int(length), dtype=torch.uint8)
        if blob:
            box.copy_(torch.frombuffer(bytearray(blob), dtype=torch.uint8))
        dist.broadcast(box, 0, group=self._control)
        return box.numpy().tobytes()


@contextmanager
def join_group(device_setting: str) -> Iterator[Group]:
    """The group of this process: an existing one (Ray Train), torchrun's, or a group of one.

    Leaves a process group it found as it was, and destroys one that it made. Raises BackendError
    when cuda is asked for and absent.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _pick_device(device_setting, local_rank)
    if dist.is_initialized():
        group = Group(device, dist.get_rank(), dist.get_world_size())
        yield group
        group.close()  # not after an error: a rank that waits in it would fail in its place
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        try:
            yield Group(device, dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Group(device)


def _pick_device(setting: str, local_rank: int) -> torch.device:
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BackendError(
            'runtime.device = "cuda", but PyTorch sees no CUDA device here; run on a GPU node, or '
            'set runtime.device to "auto" or "cpu"'
        )
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
