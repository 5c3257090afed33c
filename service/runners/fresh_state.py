"""What one trial could leave to the next in a process that serves several, and putting it back.

A process is captured before its first trial. After each one, what can be put back is put back and
read again; what cannot (memory that something still holds, threads, files, children) is named, and
the gang gives itself up. State of a thread (gradient mode, autocast, the current device and stream,
numpy's error state, what a `with` was entered and never left) needs no list: every trial has a
thread of its own.

Compiled graphs are dropped; their caches on disk stay, as they do between processes. Lands on GPU
nodes: imports neither Optuna nor MLflow.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import operator
import os
import pkgutil
import random
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

import trainer

LEFT_BYTES = 2**20
"""Memory of tensors that a trial may leave, on the host and on the device: small constants that
libraries keep."""
GROWTH_BYTES = 2 * 2**30
"""How much more than before its first trial a process may hold on the host: a warm process keeps
code and pages that no tensor owns."""
PATIENCE_S = 2.0
"""How long threads and children of a trial may take to end."""
COMPILE_WORKERS = ("_inductor", "compile_worker")
"""In the name of a thread or the command of a child: the compiler's own, which serve every
trial."""


KEPT_CACHES = ("trainer.code",)
"""Modules whose caches stay: the packed form of the code that this process has loaded is the same
for every trial, and making it takes seconds."""


@dataclass(frozen=True)
class Switch:
    """A piece of global state with a value."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


@dataclass
class ProcessState:
    """This process as it was before its first trial. All calls come from one thread, while no trial
    runs."""

    values: list[tuple[Switch, Any]]
    variables: dict[str, str]
    names: list[tuple[Any, dict[str, Any], dict[str, Any]]]
    """Modules and classes of the trainer, what their names stood for, and what containers held."""
    compiler: list[tuple[Any, dict[str, Any]]]
    """Settings of the compiler, by module."""
    threads: set[int]
    children: set[int]
    files: set[tuple[int, str]]
    device_bytes: int
    host_bytes: int

    @classmethod
    def capture(cls) -> ProcessState:
        """The state of now. Everything a trial may import from the trainer is imported, so that its
        state is known before a trial can change it; living objects are set aside for good, so
        that later only those of trials are looked at."""
        _import_all(trainer)
        if torch.cuda.is_available():
            importlib.import_module("torch._dynamo")
            importlib.import_module("torch._inductor.config")
            torch.cuda.init()
        _drop_caches()
        gc.collect()
        gc.freeze()
        return cls(
            values=[(switch, switch.read()) for switch in switches()],
            variables=dict(os.environ),
            names=[(space, dict(vars(space)), _contents(space)) for space in _namespaces()],
            compiler=[(config, config.get_config_copy()) for config in _compiler_configs()],
            threads={thread.ident or 0 for thread in threading.enumerate()},
            children={child.pid for child in psutil.Process().children(recursive=True)},
            files=set(_regular_files()),
            device_bytes=_device_bytes(),
            host_bytes=psutil.Process().memory_info().rss,
        )

    def restore(self) -> list[str]:
        """Put everything back. Returns what could not be, in words."""
        faults = self._restore_values()
        self._restore_variables()
        self._restore_names()
        _reset_compiler(self.compiler)
        _drop_caches()
        gc.collect()
        if torch.cuda.is_available():
            _clear_device()
        _reset_peak_memory()
        faults += self._threads_and_children()
        left = {name for at, name in _regular_files() if (at, name) not in self.files}
        faults += [f"{name} was left open" for name in sorted(left)]
        return faults + self._memory()

    def _restore_values(self) -> list[str]:
        for switch, value in self.values:
            # A wrong one shows when it is read again.
            with contextlib.suppress(Exception):
                switch.write(value)
        return [
            f"{switch.name} could not be put back to {str(value)[:80]}"
            for switch, value in self.values
            if not _is_same(switch.read(), value)
        ]

    def _restore_variables(self) -> None:
        for name in [name for name in os.environ if name not in self.variables]:
            del os.environ[name]
        for name, value in self.variables.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    def _restore_names(self) -> None:
        for space, names, contents in self.names:
            for name in [name for name in vars(space) if name not in names]:
                if not _is_private_to_python(name) and not isinstance(
                    vars(space)[name], ModuleType
                ):
                    delattr(space, name)
            for name, value in names.items():
                if not _is_private_to_python(name) and vars(space).get(name) is not value:
                    setattr(space, name, value)
            for name, content in contents.items():
                _refill(names[name], content)

    def _threads_and_children(self) -> list[str]:
        deadline = time.monotonic() + PATIENCE_S
        while (left := [*self._new_threads(), *self._new_children()]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        return left

    def _new_threads(self) -> Iterator[str]:
        for thread in threading.enumerate():
            if thread.ident not in self.threads and not _is_compilers(thread.name):
                yield f"thread {thread.name!r} goes on"

    def _new_children(self) -> Iterator[str]:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(child.cmdline())
                if child.pid not in self.children and not _is_compilers(command):
                    yield f"process {child.pid} ({command[:80]}) goes on"

    def _memory(self) -> list[str]:
        faults = []
        on_device = _device_bytes() - self.device_bytes
        if on_device > LEFT_BYTES:
            faults.append(f"{on_device:,} bytes of device memory did not come back")
        in_tensors, number = _tensors()
        if in_tensors > LEFT_BYTES:
            faults.append(f"{number} tensors with {in_tensors:,} bytes are still held")
        grown = psutil.Process().memory_info().rss - self.host_bytes
        if grown > GROWTH_BYTES:
            faults.append(f"the process holds {grown:,} bytes more than before its first trial")
        return faults


def switches() -> list[Switch]:
    """All values that are put back, in the order in which they are."""
    return [
        Switch("working directory", os.getcwd, os.chdir),
        Switch("sys.path", lambda: list(sys.path), lambda old: sys.path.__setitem__(_ALL, old)),
        _attribute("sys", "stdout"),
        _attribute("sys", "stderr"),
        Switch("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Switch("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        Switch("collection thresholds", gc.get_threshold, lambda old: gc.set_threshold(*old)),
        Switch("python's seed", random.getstate, random.setstate),
        Switch("numpy's seed", lambda: np.random.get_state(legacy=True), np.random.set_state),
        Switch("torch's seed", torch.get_rng_state, torch.set_rng_state),
        Switch("seeds of the GPUs", _device_seeds, _set_device_seeds),
        Switch("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Switch("threads of an operator", torch.get_num_threads, torch.set_num_threads),
        Switch("determinism", _determinism, _set_determinism),
        _attribute("torch.utils.deterministic", "fill_uninitialized_memory"),
        *_precision_switches(),
        _attribute("torch.backends.cudnn", "enabled"),
        _attribute("torch.backends.cudnn", "benchmark"),
        _attribute("torch.backends.cudnn", "deterministic"),
        *_attention_switches(),
        Switch("anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Switch(
            "default device",
            lambda: getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
            lambda old: torch.set_default_device(old.device if old is not None else None),
        ),
        # Last: what is imported on the way adds its own.
        Switch("warning filters", lambda: list(warnings.filters), _set_filters),
    ]


_ALL = slice(None)


def _attribute(path: str, name: str) -> Switch:
    """An attribute of sys or of something in torch."""
    root, _, rest = path.partition(".")
    owner = {"sys": sys, "torch": torch}[root]
    owner = operator.attrgetter(rest)(owner) if rest else owner
    return Switch(
        f"{path}.{name}",
        lambda: _unless_mixed(lambda: getattr(owner, name)),
        functools.partial(setattr, owner, name),
    )


def _unless_mixed(read: Callable[[], Any]) -> Any:
    """torch refuses to read a flag of TF32 where its older and newer forms disagree."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


def _precision_switches() -> list[Switch]:
    """Flags of TF32, in the older form and then in the newer, which knows more."""
    matmul = "torch.backends.cuda.matmul"
    older = [
        Switch(
            "precision of matrix products",
            lambda: _unless_mixed(torch.get_float32_matmul_precision),
            torch.set_float32_matmul_precision,
        ),
        _attribute(matmul, "allow_tf32"),
        _attribute(matmul, "allow_fp16_reduced_precision_reduction"),
        _attribute(matmul, "allow_bf16_reduced_precision_reduction"),
        _attribute("torch.backends.cudnn", "allow_tf32"),
    ]
    owners = ["torch.backends", matmul]
    for library in ("torch.backends.cudnn", "torch.backends.mkldnn"):
        owners += [library, *(f"{library}.{part}" for part in ("conv", "rnn", "matmul"))]
    return older + [_attribute(path, "fp32_precision") for path in owners if _has_precision(path)]


def _has_precision(path: str) -> bool:
    with contextlib.suppress(AttributeError):
        owner = operator.attrgetter(path.removeprefix("torch."))(torch)
        return hasattr(owner, "fp32_precision")
    return False


def _attention_switches() -> list[Switch]:
    """Which kernels scaled_dot_product_attention may choose from."""
    cuda, found = torch.backends.cuda, []
    for kind in ("flash", "mem_efficient", "math", "cudnn"):
        read, write = (getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"))
        found.append(Switch(f"{kind} attention", read, write))
    return found


def _set_filters(old: list[Any]) -> None:
    warnings.filters[:] = old  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _determinism() -> tuple[bool, bool]:
    on = torch.are_deterministic_algorithms_enabled()
    return on, torch.is_deterministic_algorithms_warn_only_enabled()


def _set_determinism(old: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(old[0], warn_only=old[1])


def _device_seeds() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_device_seeds(old: list[torch.Tensor]) -> None:
    if old:
        torch.cuda.set_rng_state_all(old)


def _is_same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal, those of nested sequences and arrays included."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, np.ndarray):
        return np.array_equal(found, wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    return bool(found is wanted or found == wanted)


def _import_all(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(".__main__"):
            # What cannot be imported here, such as kernels without a GPU, no trial can import.
            with contextlib.suppress(Exception):
                importlib.import_module(module.name)


def _namespaces() -> Iterator[Any]:
    """Modules of the trainer and the classes they define."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == trainer.__name__:
            yield module
            yield from (
                value
                for value in vars(module).values()
                if isinstance(value, type) and value.__module__ == name
            )


def _contents(space: Any) -> dict[str, Any]:
    """Copies of the containers that names of a module or class stand for."""
    return {
        name: value.copy()
        for name, value in vars(space).items()
        if type(value) in (dict, list, set) and not _is_private_to_python(name)
    }


def _refill(container: Any, content: Any) -> None:
    """Give a container its former content. Compared by identity: values may be arrays."""
    same = len(container) == len(content) and all(
        mine is theirs for mine, theirs in zip(_items(container), _items(content), strict=True)
    )
    if same:
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _items(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    return sorted(container, key=id) if isinstance(container, set) else list(container)


def _is_private_to_python(name: str) -> bool:
    return name.startswith("__") or name == "_abc_impl"


def _drop_caches() -> None:
    """Forget what the trainer's functions remember."""
    for space in _namespaces():
        for value in list(vars(space).values()):
            clear = getattr(value, "cache_clear", None)
            if callable(clear) and getattr(value, "__module__", None) not in KEPT_CACHES:
                clear()


def _compiler_configs() -> Iterator[Any]:
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        if name in sys.modules:
            yield sys.modules[name]


def _reset_compiler(settings: list[tuple[Any, dict[str, Any]]]) -> None:
    for config, old in settings:
        if not _is_same(config.get_config_copy(), old):
            config.load_config(old)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _clear_device() -> None:
    torch.cuda.synchronize()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _reset_peak_memory() -> None:
    """Let the process's own peak of memory count from now; where the kernel does not allow it, the
    peak of a trial on the CPU includes those of earlier ones."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _device_bytes() -> int:
    """Bytes of the device that tensors hold."""
    if not torch.cuda.is_available():
        return 0
    _clear_device()
    return torch.cuda.memory_allocated()


def _tensors() -> tuple[int, int]:
    """Bytes and number of tensors that live since the capture. Storage that tensors share counts
    once."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    sizes = {}
    for tensor in found:
        with contextlib.suppress(Exception):  # a tensor without storage
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values()), len(found)


def _regular_files() -> Iterator[tuple[int, str]]:
    """Open files of this process: (descriptor, path), without sockets, devices, Ray's own logs."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path, kind = os.readlink(f"/proc/self/fd/{name}"), os.stat(f"/proc/self/fd/{name}")
            is_rays = "/session_" in path and "/logs/" in path
            if (
                stat.S_ISREG(kind.st_mode)
                and not is_rays
                and not path.startswith(("/dev/", "/mem"))
            ):
                yield int(name), path


def _is_compilers(name: str) -> bool:
    return any(mark in name for mark in COMPILE_WORKERS)
