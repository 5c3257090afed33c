"""Runs trials as torchrun on this machine, without Ray: `python -m trainer` with a folder each.

The trainer writes the folder itself; this runner follows metrics.jsonl, asks for a stop through a
file, and knows how to end every process. torchrun puts its ranks into sessions of their own, out of
reach of a process group, so they are found by a token in their environment; and the kernel tells
torchrun when the driver is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import trainer
from service.errors import RunnerError
from service.runners.base import Demand, RunState, Update
from service.runners.gpu_watch import append_to, watch_gpus
from service.runners.processes import kill, marked
from service.trial import TrialFolder, TrialSpec, write_json

TOKEN = "CADDIE_LOCAL_TRIAL"
"""Environment variable that all processes of a trial carry, with a value of its own."""
TERM_GRACE_S = 5.0
"""How long torchrun may take to end its ranks before they are killed."""
LOG_TAIL_LINES = 60
"""How much of train.log an error repeats."""
OUT_OF_MEMORY_MARKS = (
    "OutOfMemoryError",
    "MemoryError",
    "CUDA out of memory",
    "can't allocate memory",
)

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


@dataclass
class LocalTrial:
    """A submitted trial: its launcher (torchrun, or the trainer itself) and how far it was read."""

    spec: TrialSpec
    demand: Demand
    gpus: list[str]
    token: str
    launcher: subprocess.Popen[bytes]
    position: int = 0
    """Bytes of metrics.jsonl that were handed out."""
    state: RunState = RunState.STARTING
    ending: threading.Thread | None = None
    watching: ExitStack = field(default_factory=ExitStack)
    """Samples its GPUs until it is closed."""

    @property
    def folder(self) -> TrialFolder:
        return TrialFolder(self.spec.folder)

    def read_events(self) -> list[dict[str, Any]]:
        """Complete new lines of metrics.jsonl."""
        if not self.folder.metrics.exists():
            return []
        with self.folder.metrics.open("rb") as file:
            file.seek(self.position)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return []
        self.position += len(whole) + 1
        events = [json.loads(line) for line in whole.splitlines()]
        if any(event["kind"] == "step" for event in events):
            self.state = RunState.RUNNING
        return events

    def end(self) -> None:
        """End all its processes; returns when none is left."""
        self.watching.close()
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):  # then the ranks first: they outlive it
                self.launcher.wait(TERM_GRACE_S)
        kill(list(processes_with(self.token)))
        self.launcher.wait()


@dataclass
class _Devices:
    """What this machine has to give."""

    cpus: float
    gpus: list[str] = field(default_factory=list)

    def slots(self, demand: Demand) -> int:
        cpus, gpus = (
            demand.workers * demand.cpus_per_worker,
            demand.workers * demand.gpus_per_worker,
        )
        if demand.gpus_per_worker % 1:
            return 0  # torchrun cannot share a GPU fairly
        limits = [int(self.cpus / cpus + 1e-6)] if cpus else []
        limits += [int(len(self.gpus) / gpus)] if gpus else []
        return max(0, min(limits, default=0))


class LocalRunner:
    """See service.runners.base.Runner. Submit from a thread that lives as long as the trials: the
    kernel ends them with the thread that started them."""

    def __init__(
        self,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        module: str = "trainer",
    ) -> None:
        """Use at most num_cpus and num_gpus (default: what this process may use). `module` is run
        with the command line of `python -m trainer`."""
        self._cpus = num_cpus or len(os.sched_getaffinity(0))
        self._gpus = visible_gpus()[:num_gpus]
        self._module = module
        self._trials: dict[int, LocalTrial] = {}
        self._ending: list[LocalTrial] = []

    def free_slots(self, demand: Demand) -> int:
        return self._free().slots(demand)

    def total_slots(self, demand: Demand) -> int:
        return _Devices(self._cpus, self._gpus).slots(demand)

    def submit(self, spec: TrialSpec, demand: Demand) -> None:
        if self.total_slots(demand) == 0:
            raise RunnerError(
                f"trial {spec.key} needs {demand.workers} workers of {demand.cpus_per_worker:g} "
                f"CPU and {demand.gpus_per_worker:g} GPU (whole GPUs only), and this machine has "
                f"{self._cpus} CPU and {len(self._gpus)} GPU; lower --workers-per-trial or "
                "--gpus-per-worker"
            )
        if spec.number in self._trials:
            raise RunnerError(f"trial {spec.key} runs already; poll it to its end, or cancel it")
        for earlier in self._ending:
            if earlier.spec.folder == spec.folder and earlier.ending:
                earlier.ending.join()  # both write there
        free = self._free().gpus
        gpus = free[: int(demand.workers * demand.gpus_per_worker)]
        self._trials[spec.number] = _launch(spec, demand, gpus, self._module)

    def poll(self, number: int) -> Update:
        trial = self._trial(number)
        code = trial.launcher.poll()  # first: the files are complete once it has exited
        events = trial.read_events()
        if code is None:
            return Update(trial.state, events)
        del self._trials[number]
        trial.end()
        result = trial.folder.read_result()
        if result is not None:  # written last of all; a crash in the exit after it changes nothing
            return Update(RunState.FINISHED, events, result)
        state, error = _explain(trial, code)
        return Update(state, events, error=error)

    def request_stop(self, number: int, reason: str) -> None:
        stop = self._trial(number).spec.folder / "stop"
        partial = stop.with_name("stop.partial")
        partial.write_text(reason + "\n")
        partial.replace(stop)

    def cancel(self, number: int, hung: bool = False) -> None:
        trial = self._trial(number)
        del self._trials[number]
        trial.ending = threading.Thread(target=trial.end, name=f"end {trial.spec.key}")
        trial.ending.start()
        self._ending.append(trial)

    def close(self) -> None:
        for number in list(self._trials):
            self.cancel(number)
        for trial in self._ending:
            if trial.ending:
                trial.ending.join()
        self._ending = []

    def _trial(self, number: int) -> LocalTrial:
        if number not in self._trials:
            raise RunnerError(f"trial {number} is not running here; submit it first")
        return self._trials[number]

    def _free(self) -> _Devices:
        self._ending = [trial for trial in self._ending if trial.ending and trial.ending.is_alive()]
        busy = [*self._trials.values(), *self._ending]
        taken = {gpu for trial in busy for gpu in trial.gpus}
        cpus = sum(trial.demand.workers * trial.demand.cpus_per_worker for trial in busy)
        return _Devices(self._cpus - cpus, [gpu for gpu in self._gpus if gpu not in taken])


def _launch(spec: TrialSpec, demand: Demand, gpus: list[str], module: str) -> LocalTrial:
    folder = TrialFolder(spec.folder)
    folder.clear_run()
    if not folder.config.exists():
        write_json(folder.config, spec.config.to_dict())
    token = secrets.token_hex(8)
    with folder.log.open("ab") as log:
        launcher = subprocess.Popen(
            _command(spec, demand, module),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(demand, gpus), TOKEN: token},
            start_new_session=True,  # Ctrl-C is for the driver, which then decides
            preexec_fn=_die_with(os.getpid()),
        )
    trial = LocalTrial(spec, demand, gpus, token, launcher)
    trial.watching.enter_context(watch_gpus(gpus, append_to(folder.metrics)))
    return trial


def _command(spec: TrialSpec, demand: Demand, module: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(demand.workers)]
    config = str(TrialFolder(spec.folder).config)
    task = ["-m", module, "--config", config, "--out", str(spec.folder), "--quiet"]
    return [sys.executable, *(launcher if demand.workers > 1 else []), *task]


def _environment(demand: Demand, gpus: list[str]) -> dict[str, str]:
    root = str(Path(trainer.__path__[0]).parent)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(max(1, int(demand.cpus_per_worker))),
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
    }


def _die_with(driver: int) -> Any:
    """For the child, before it becomes the launcher: SIGTERM when the driver dies. torchrun then
    ends its ranks."""

    def set_death_signal() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != driver:  # it died in between
            os._exit(1)

    return set_death_signal


def _explain(trial: LocalTrial, code: int) -> tuple[RunState, str]:
    """State and error of a launcher that exited without a result."""
    log = trial.folder.log
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    tail = "\n".join(lines[-LOG_TAIL_LINES:])
    short = next((line for line in reversed(lines) if line.startswith("trainer: ")), None)
    ended = f"signal {-code}" if code < 0 else f"code {code}"
    head = short.removeprefix("trainer: ") if short else f"the trainer ended with {ended}"
    out_of_memory = any(mark in tail for mark in OUT_OF_MEMORY_MARKS)
    error = (
        f"{head}\n\nend of {log}:\n{tail}\n\n"
        f"trial {trial.spec.key}, attempt {trial.spec.attempt}, "
        f"config {trial.spec.digest}\n"
        f"alone: caddie trial rerun {trial.spec.study} {trial.spec.number}"
    )
    return (RunState.OUT_OF_MEMORY if out_of_memory else RunState.FAILED), error


def processes_with(token: str) -> Iterable[psutil.Process]:
    """Living processes of the trial with this token."""
    return (process for process, environment in marked(TOKEN) if environment[TOKEN] == token)


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; does not start CUDA."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    present = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(present.iterdir())))] if present.exists() else []
