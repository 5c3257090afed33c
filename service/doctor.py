"""`caddie doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from service.config import mask_passwords

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
FREE_DISK_BYTES = 2_000_000_000
"""Room for a sweep's artifacts, logs and databases."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome."""

    check: str
    ok: bool
    detail: str
    remedy: str = ""
    """What to do; empty when all is well."""


def examine(
    out_dir: Path, storage_url: str, tracking_uri: str, address: str | None
) -> list[Finding]:
    """Run every check; one that breaks down is a finding too."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "gpus": check_gpus,
        "attention": check_attention,
        "ports": check_ports,
        "storage": lambda: check_storage(storage_url),
        "tracking": lambda: check_tracking(tracking_uri),
        "ray": lambda: check_ray(address),
        "disk": lambda: check_disk(out_dir),
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}", "see above"))
    return findings


def as_rows(findings: list[Finding]) -> list[dict[str, Any]]:
    """The contract's list of {check, ok, detail, remedy}."""
    return [asdict(finding) for finding in findings]


def check_python() -> Finding:
    """The interpreter is new enough."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    wanted = ".".join(str(part) for part in OLDEST_PYTHON)
    ok = sys.version_info[:2] >= OLDEST_PYTHON
    return Finding("python", ok, found, "" if ok else f"install Python {wanted} or newer")


def check_packages() -> Finding:
    """What a sweep imports is installed."""
    names = ("torch", "ray", "optuna", "optuna-dashboard", "mlflow", "sentencepiece", "brotli")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    detail = ", ".join(found) + (f"; missing: {', '.join(missing)}" if missing else "")
    remedy = f"pip install {' '.join(missing)}" if missing else ""
    return Finding("packages", not missing, detail, remedy)


def check_torch() -> Finding:
    """torch loads and is new enough."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    ok = version >= OLDEST_TORCH
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads"
    return Finding("torch", ok, detail, "" if ok else "install torch 2.11 or newer")


def check_gpus() -> Finding:
    """GPUs that torch sees. None is fine: a laptop sweeps on its processor."""
    import torch

    if not torch.cuda.is_available():
        hint = "" if shutil.which("nvidia-smi") is None else "; nvidia-smi is here, torch sees none"
        ok = not hint
        return Finding(
            "gpus", ok, "none: runs on the processor" + hint, "" if ok else "install torch for CUDA"
        )
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    return Finding("gpus", True, f"{len(names)}: {', '.join(names)}")


def check_attention() -> Finding:
    """Which attention backends can be built here."""
    import torch

    from trainer.attention import select_backend
    from trainer.errors import TrainerError

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, missing = [], []
    for name in ("sdpa", "flex", "cudnn", "flash4"):
        try:
            select_backend(name, device, lambda line: None)
            found.append(name)
        except TrainerError as error:
            missing.append(f"{name} ({error})")
    detail = f"{device}: {', '.join(found) or 'none'}"
    if missing:
        detail += f"; not here: {', '.join(missing)}"
    ok = "sdpa" in found
    return Finding("attention", ok, detail, "" if ok else "reinstall torch")


def check_ports() -> Finding:
    """Loopback ports can be opened, as `caddie ui` and Ray need."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    return Finding("ports", True, "loopback ports can be opened")


def check_storage(url: str) -> Finding:
    """The Optuna storage opens; a SQLite file that is not there yet is fine."""
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        if not path.exists():
            return Finding("storage", True, f"{url}: made by the first sweep")
    import optuna

    shown = mask_passwords(url)
    try:
        names = optuna.get_all_study_names(storage=url)
    except Exception as error:
        detail = f"{shown}: {mask_passwords(str(error)).splitlines()[0]}"
        return Finding("storage", False, detail, "check --storage and that its server is up")
    return Finding("storage", True, f"{shown}: {len(names)} studies")


def check_tracking(uri: str) -> Finding:
    """MLflow's server answers; a SQLite file needs no server."""
    shown = mask_passwords(uri)
    if not uri.startswith(("http://", "https://")):
        return Finding("tracking", True, f"{shown}: needs no server")
    import urllib.request

    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5) as answer:
            return Finding("tracking", answer.status == 200, f"{shown}: answers {answer.status}")
    except OSError as error:
        remedy = "start it (`caddie ui` shows how) or drop --tracking-uri; sweeps run without it"
        return Finding("tracking", False, f"{shown}: {error}", remedy)


def check_ray(address: str | None) -> Finding:
    """Ray is installed and, when an address is given, a cluster listens there."""
    version = metadata.version("ray")
    if address is None or address == "local":
        return Finding("ray", True, f"{version}; a sweep starts its own on this machine")
    if address == "auto":
        return Finding("ray", True, f"{version}; a sweep joins the cluster of this machine")
    host, _, port = address.removeprefix("ray://").partition(":")
    try:
        with socket.create_connection((host, int(port or 6379)), timeout=5):
            return Finding("ray", True, f"{version}; {address} listens")
    except (OSError, ValueError) as error:
        return Finding("ray", False, f"{address}: {error}", "start it with `ray start --head`")


def check_disk(out_dir: Path) -> Finding:
    """There is room where trial folders go."""
    place = out_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    ok = free >= FREE_DISK_BYTES
    remedy = "" if ok else f"free at least {FREE_DISK_BYTES / 1e9:.0f} GB or choose another --out"
    return Finding("disk", ok, f"{free / 1e9:.1f} GB free at {place}", remedy)
