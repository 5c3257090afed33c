"""Where the compiler keeps what it made, so that the second trial of a shape finds it.

PyTorch and Triton keep compiled graphs and kernels in folders that environment variables name, by
default below /tmp, which a container or a reboot empties. Whoever starts a run (`caddie train`,
`python -m trainer`, a worker on Ray) names a lasting one before the compiler is first used; the
trainer itself knows nothing of it. The compiler's own keys tell graphs, settings and devices apart;
folders by version only make old ones easy to find and delete.

What lies there is code that the next run loads: the folder belongs to the user alone, and one of
somebody else is refused. Loads without torch.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

from trainer.errors import ConfigError

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables of PyTorch and Triton, and our folders' names for what they keep."""


def use_compile_cache(
    setting: str, environment: MutableMapping[str, str] = os.environ
) -> Path | None:
    """Point the compiler to the folder of runtime.compile_cache. Call it before torch compiles.

    Args:
        setting: "auto", "off" or a folder, which is made where it does not exist.

    Returns: the folder in use, None where the compiler's own is.
    Raises: ConfigError when a folder that was named cannot be used; "auto" then does without.
    """
    given = [name for name in VARIABLES if environment.get(name)]
    if setting == "off" or (setting == "auto" and given):
        return None
    root = user_folder(environment) if setting == "auto" else Path(setting).expanduser()
    folder = root.resolve() / _versions()
    try:
        for name in VARIABLES.values():
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
    except OSError as error:
        if setting == "auto":
            return None
        raise ConfigError(
            f"runtime.compile_cache = {setting!r}: {error.strerror or error}; name a folder that "
            "is yours and can be written to, or set runtime.compile_cache = off"
        ) from None
    for variable, name in VARIABLES.items():
        environment[variable] = str(folder / name)
    return folder


def user_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Where "auto" keeps it: below the user's own folder of caches."""
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "caddie" / "compiled"


def _check_owner(folder: Path) -> None:
    for path in (folder, *(folder / name for name in VARIABLES.values())):
        found = path.stat()
        others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid != os.getuid() or others_write:
            raise PermissionError(0, f"{path} belongs to others, or others may write to it")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, f"{path} cannot be written to")


def _versions() -> str:
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return "-".join([python, *(f"{name}{_version(name)}" for name in ("torch", "triton"))])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
