"""Where a result comes from: code, data, versions, hardware, command. Never a secret.

Collected once per driver, written into every trial's folder with what is the trial's own.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from service.config import mask_passwords

PACKAGES = (
    "brotli",
    "caddie",
    "mlflow",
    "mlflow-skinny",
    "numpy",
    "optuna",
    "pydantic",
    "ray",
    "sentencepiece",
    "torch",
    "triton",
    "zstandard",
)
MAX_DIFF_CHARS = 200_000
SECRET_WORDS = ("token", "password", "passwd", "secret", "api-key", "apikey", "api_key")


def collect(
    *,
    data_digest: str | None = None,
    command: Sequence[str] | None = None,
    code_dir: Path | None = None,
) -> dict[str, Any]:
    """Everything about this driver and machine that a trial's provenance.json repeats.

    Args:
        data_digest: Of the data set, from trainer.data.
        command: Command line; None = this process's.
        code_dir: Any folder of the code's repository; None = where this module lies.
    """
    return {
        "code": describe_code(code_dir or Path(__file__).parent),
        "data_digest": data_digest,
        "command": mask_command(sys.argv if command is None else command),
        "python": platform.python_version(),
        "packages": package_versions(),
        "hardware": describe_hardware(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def describe_code(folder: Path) -> dict[str, Any]:
    """Commit, and what differs from it; all None where git or a repository is missing."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "diff": None, "untracked": None}
    diff = _git(folder, "diff", "HEAD") or ""
    if len(diff) > MAX_DIFF_CHARS:
        diff = diff[:MAX_DIFF_CHARS] + f"\n... {len(diff) - MAX_DIFF_CHARS} characters left out"
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--full-name") or ""
    return {
        "commit": commit.strip(),
        "diff": mask_passwords(diff),
        "untracked": untracked.splitlines(),
    }


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a result may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def describe_hardware() -> dict[str, Any]:
    """The driver's machine; a trial's own device is in its result.json."""
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def mask_command(command: Sequence[str]) -> list[str]:
    """The command line without passwords in URLs and without values of secret options."""
    masked, hide_next = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("-") and any(secret in name.lower() for secret in SECRET_WORDS)
        if hide_next and not word.startswith("-"):
            word = "***"
        elif is_secret and equals:
            word = f"{name}=***"
        hide_next = is_secret and not equals
        masked.append(mask_passwords(word))
    return masked


def _git(folder: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(folder), *arguments)


def _gpus() -> list[str]:
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return (_output("nvidia-smi", *query) or "").strip().splitlines()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
