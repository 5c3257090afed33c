"""Runs the prover in a clean process: a folder of its own, few variables, bounded time and memory.

It guards against accidents and against hostile data. It is no jail: a hostile *program* that is run
in it on purpose still has the rights of whoever runs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from service.verify.folder import shown

PASSED_ON = (
    *("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("CUDA_HOME", "TRITON_PTXAS_PATH", "CC", "TZ"),
)
"""Variables that a child gets; secrets are in none of them."""
FILE_BYTES = 1 << 30
"""A child may write no larger file."""
MAX_OUTPUT_BYTES = 1 << 20
"""More of what a child says is not read."""
POLL_S = 0.05

_PROVER = Path(__file__).with_name("prover.py")
ROOT = Path(__file__).resolve().parents[2]
"""Folder of the packages."""


@dataclass(frozen=True)
class Limits:
    """What a child may take."""

    seconds: float
    memory_bytes: int
    """Resident, of all its processes together."""
    data_bytes: int = 0
    """Private memory that the system grants at all; 0 = not limited (torch's GPU side reserves
    address space beyond any limit)."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    result: dict[str, Any] | None
    """What it wrote; None when it wrote nothing."""
    printed: str
    """On standard output."""
    fault: str | None
    """Why it failed, in a sentence; None when it ended well."""
    seconds: float


def prove(job: dict[str, Any], folder: Path, limits: Limits, num_processes: int = 1) -> Outcome:
    """Run one job of prover.py with `folder` as its working directory, and wait for it.

    Args:
        num_processes: more than one: under torchrun.
    """
    result = folder / "prover.result.json"
    result.unlink(missing_ok=True)
    of_child = {"file_bytes": FILE_BYTES, "data_bytes": limits.data_bytes}
    job_file = folder / "prover.job.json"
    job_file.write_text(json.dumps({**job, "root": str(ROOT), "limits": of_child}))
    launch = [sys.executable, "-I"]
    if num_processes > 1:
        module = ["-m", "torch.distributed.run", "--standalone", "--no-python"]
        launch += [*module, f"--nproc-per-node={num_processes}", sys.executable, "-I"]
    command = [*launch, str(_PROVER), str(job_file), str(result)]
    started = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            fault = _wait(child, limits, [output.fileno(), errors.fileno()])
        finally:
            _end(child)
        printed, said = _start(output.fileno()), _end_of(errors.fileno())
    seconds = time.monotonic() - started
    if fault is None and child.returncode:
        last = said.strip().rpartition("\n")[2]
        fault = f"it ended with code {child.returncode}: {shown(last, 300) or 'it said nothing'}"
    return Outcome(_written(result), printed, fault, seconds)


def _wait(child: subprocess.Popen[bytes], limits: Limits, outputs: Sequence[int]) -> str | None:
    """Until it ends or takes more than it may; what it took too much of."""
    deadline = time.monotonic() + limits.seconds
    while True:
        with suppress(subprocess.TimeoutExpired):
            child.wait(POLL_S)
            return None
        if time.monotonic() > deadline:
            return f"it was not done after {limits.seconds:,.0f} s"
        if (resident := _resident(child.pid)) > limits.memory_bytes:
            return f"it took {resident / 2**30:.1f} GiB of memory, the limit is {_gib(limits)}"
        if any(os.fstat(output).st_size > 64 * MAX_OUTPUT_BYTES for output in outputs):
            return "it printed without end"


def _gib(limits: Limits) -> str:
    return f"{limits.memory_bytes / 2**30:.1f}"


def _resident(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child and its children."""
    left: list[psutil.Process] = []
    with suppress(psutil.Error):
        left = psutil.Process(child.pid).children(recursive=True)
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    for process in left:  # those with a session of their own, as torchrun's ranks have
        with suppress(psutil.Error):
            process.kill()
    child.wait()


def _environment(folder: Path) -> dict[str, str]:
    own = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    places = ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    return own | dict.fromkeys(places, str(folder)) | {"PYTHONDONTWRITEBYTECODE": "1"}


def _start(handle: int) -> str:
    return os.pread(handle, MAX_OUTPUT_BYTES, 0).decode(errors="replace")


def _end_of(handle: int) -> str:
    size = os.fstat(handle).st_size
    return os.pread(handle, 4096, max(0, size - 4096)).decode(errors="replace")


def _written(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(MAX_OUTPUT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None
